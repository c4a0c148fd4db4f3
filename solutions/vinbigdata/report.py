"""VinBigData's sections of the report: APs and errors by class, rules, the 2CC and pictures with boxes."""

import pandas as pd

from common.compare import groups_of
from common.kaggle.session import display_boxes
from common.metrics.detection import evaluate, pr_curve
from common.paths import read_csv, read_json, read_parquet
from common.post.boxes import BOX
from common.report import detection_plots, page, plots, results
from common.report.frame import step_section
from common.report.gallery import MOST_BOXES, best_boxes, box_gallery
from solutions.vinbigdata.config import CLASSES, KAGGLE, NO_FINDING
from solutions.vinbigdata.data import FINDINGS, truth_of
from solutions.vinbigdata.experiments import ALWAYS, LOCATIONS, PUBLISHED_SWEEP
from solutions.vinbigdata.postprocess import parse_predictions

TITLE = "VinBigData detection"


def hints(job, score, trainings):
    """Return a hint if one member alone has a higher mAP over the findings than all members fused."""
    members = read_csv(job.run.path("members.csv"), ["member", "map"])
    best, fused = members.loc[members["map"].idxmax()], score["map_findings"]
    if len(members) < 2 or fused is None or fused >= best["map"]:
        return []
    return [
        f"Fused and after the rule, the findings have a mAP of {fused:.3f}, those of {best['member']} alone "
        f"{best['map']:.3f}: compare `--members {best['member']}`."
    ]


def headline(job, score):
    """Return the mAP, its parts and the accuracy of the 2CC as cards, and a note on how they were measured."""
    found, healthy = score["map"], score["healthy"]
    cards = [
        ("mAP@0.4, out of fold", found["estimate"], page.range_text(found)),
        ("mAP@0.4 without boxes", score["map_no_finding"], "No finding on every image"),
        ("AP of the findings", score["map_findings"], f"mean; No finding: {page.as_text(score['ap_no_finding'])}"),
        ("Images", score["images"], f"{score['abnormal']} with a finding; {score['classes']} of 15 classes occur"),
        ("2CC accuracy", healthy["accuracy"], f"AUROC {page.as_text(healthy['auroc'])}"),
    ]
    return [page.cards(cards), page.nested_note(score["nested_by"], "mAP", score["map_not_nested"])]


def sections(job):
    """Return the data section and the sections of those results that are up to date."""
    parts = [_data(job.images)]
    if job.is_current("tune"):
        rows, found = job.images.rows(folds=job.config.folds), read_parquet(job.run.path("oof_decided.parquet"))
        health = read_parquet(job.run.path("oof_healthy.parquet")).set_index("image_id")["healthy"]
        scored = job.images.at(rows).reset_index(drop=True)
        scored["health"] = health[scored["image_id"]].to_numpy()
        scored["note"] = " · p " + scored["health"].map("{:.3f}".format)
        parts += [_classes(job, found, rows, scored), _decision(job.run), _healthy(job.run, scored)]
        parts += _pictures(job.images, found, scored)
    return [*parts, step_section(job, "ablate", "Ablation", _ablation)]


def _data(images):
    train = images.table[images.table["split"] == "train"]
    boxes = images.tables["boxes.parquet"].merge(images.table[["row", "width", "height"]], on="row")
    shares = boxes[BOX].to_numpy() / boxes[["width", "height", "width", "height"]].to_numpy()
    boxes["area"] = 100 * (shares[:, 2] - shares[:, 0]) * (shares[:, 3] - shares[:, 1])
    by_class = boxes.groupby("class_id")["area"]
    counts = pd.DataFrame({"class": CLASSES, "images": [*train[FINDINGS].sum(), (train["abnormal"] == 0).sum()]})
    counts["boxes"], counts["median area, %"] = by_class.size().astype("Int64"), by_class.median()
    folds = results.fold_table(train, abnormal=("abnormal", "sum"))
    maps = {CLASSES[k]: shares[boxes["class_id"] == k] for k in range(NO_FINDING)}
    return page.section(
        "Data",
        f"{len(train):,} labelled images, {train['abnormal'].sum():,} of them with {len(boxes):,} boxes; "
        f"{sum(images.table.split == 'test'):,} to predict.",
        page.grid(page.table(counts, "Classes"), page.table(folds, "Folds, stratified by every class")),
        page.figure(detection_plots.location_maps(maps), "Where the boxes of each class are"),
        page.figure(plots.histogram({"boxes": boxes["area"]}, "box area, % of the image"), "Sizes of the boxes"),
    )


def _classes(job, found, rows, scored):
    columns = ["name", "ap", "low", "high", "n_truth", "n_detections", "recall", "best_f1", "score_at_best_f1"]
    classes, errors = read_csv(job.run.path("classes.csv"), columns), read_csv(job.run.path("errors.csv"), ["error"])
    result, curves = evaluate(found, truth_of(job.images, rows), scored["image_id"]), {}
    for class_id, ap in result.classes.loc[result.classes["n_truth"] > 0, "ap"].items():
        curve = pr_curve(result, class_id)
        curves[CLASSES[class_id]] = curve["recall"], curve["precision"], ap
    aps = plots.score_with_interval(classes[columns[:4]].itertuples(index=False), "AP")
    counts = detection_plots.bars(errors["error"], errors["count"], "count")
    gains = detection_plots.bars(errors["error"], errors["ap_gained"], "mAP gained")
    return page.section(
        "Classes",
        page.table(classes[columns], "Average precision at IoU > 0.4, out of fold"),
        page.grid(
            page.figure(aps, f"AP of each class; {plots.FEW}"),
            page.figure(detection_plots.pr_curves(curves), "Precision by recall, with the AP of each class"),
            page.figure(counts, "Errors"),
            page.figure(gains, "mAP gained by correcting one kind of error"),
        ),
    )


def _decision(run):
    tuned, sweep = read_json(run.path("tuned.json")), read_csv(run.path("sweep.csv"), ["alpha", "beta", "map"])
    surface, rule = read_csv(run.path("surface.csv"), ["iou", "skip", "map"]), tuned["rule"]
    rules = page.rules_table(rule, tuned["part_rules"])
    rules["weights"] = [" ".join(f"{weight:g}" for weight in weights) for weights in rules["weights"]]
    caption = "mAP of all images by alpha and beta; beta -1: No finding on every image"
    figures = results.rule_surface(sweep, "alpha", "beta", "map", rule, caption)
    caption = "mAP of all images by iou and skip, with the best other settings"
    figures += results.rule_surface(surface, "iou", "skip", "map", rule, caption)
    return page.section(
        "Decision",
        page.table(rules, "Rules, chosen on out-of-fold boxes (beta -1: No finding on every image, the winners' rule)"),
        page.table(read_csv(run.path("members.csv")), "Members: weight in the fusion, mAP of the findings"),
        page.grid(*figures),
    )


def _healthy(run, scored):
    rule = read_json(run.path("tuned.json"))["rule"]
    shares = pd.DataFrame(read_json(run.path("score.json"))["healthy"]["share_above"]).T.dropna()
    above = shares.map("{:.1%}".format).rename(columns=lambda end: f"above {end} {rule[end]:g}")
    table = scored.assign(healthy=1 - scored["abnormal"])
    drawn = results.one_class(table, "healthy", "health", ("abnormal", "healthy"), 0.5, groups_of(scored))
    caption = "Shares of the out-of-fold and of the test images (mean of folds' logits)"
    above = above.rename_axis("images").reset_index()
    return page.section("Healthy or not (2CC)", *drawn, page.table(above, caption))


def _pictures(images, found, scored, count=8):
    """Return the section on the worst errors and the one with pictures of findings."""
    abnormal, normal = (scored[scored["abnormal"] == value] for value in (1, 0))
    boxes = found[found["class_id"] != NO_FINDING]
    highest = boxes[boxes["image_id"].isin(normal["image_id"])].groupby("image_id")["score"].max()
    false = highest.nlargest(count // 2).index
    missed = abnormal[~abnormal["image_id"].isin(boxes["image_id"])].sort_values("health", ascending=False)
    groups = {
        "Boxes on images without findings": normal.set_index("image_id", drop=False).loc[false],
        "Findings missed: the rule left no box": missed[: count // 2],
        "With findings": abnormal[:: max(1, len(abnormal) // count)][:count],
    }
    galleries = {title: box_gallery(images, boxes, rows, title, CLASSES) for title, rows in groups.items() if len(rows)}
    text = f"At most {MOST_BOXES} boxes per image, those with the highest scores; p: probability of being healthy."
    listed = scored[["image_id", "fold", "abnormal", "health"]]
    listed = listed.assign(boxes=boxes["image_id"].value_counts().reindex(scored["image_id"], fill_value=0).to_numpy())
    listed = listed.iloc[(scored["abnormal"] - 1 + scored["health"]).abs().argsort()[::-1]]
    listed = listed.rename(columns={"health": "p"})
    others = [page.section("Pictures", galleries.pop("With findings"))] if "With findings" in galleries else []
    return [results.worst_errors(listed, text, *galleries.values()), *others]


def _ablation(job):
    read = lambda name: read_csv(job.run.path(name))  # noqa: E731
    steps, sweep, errors, members, classes, curves = map(read, ALWAYS)
    lines = [table[[table.columns[0], "map", "low", "high"]].itertuples(index=False) for table in (steps, members)]
    fused = {f"{rank}. {name}": (part["iou"], part["map"]) for (rank, name), part in sweep.groupby(["rank", "member"])}
    paper = [(f"paper, {rank}.", *span) for rank, span in enumerate(PUBLISHED_SWEEP, 1)]
    by_member = {name: (part["iteration"], part["map_coco"]) for name, part in curves.groupby("member", sort=False)}
    return [
        page.table(steps, "The paper's table 1, out of fold, nested; paper: its score on the test set"),
        page.table(errors, "Errors of the findings before (WBF) and after the 2CC, and mAP gained by correcting them"),
        page.grid(
            page.figure(plots.score_with_interval(lines[0], "mAP@0.4"), "The paper's table 1 on these images"),
            page.figure(
                detection_plots.curves(fused, "IoU; 1: not fused", "mAP@0.4", paper),
                "WBF of one member's boxes, the best and the second-best; shaded: the paper's ranges, on its test set",
            ),
            page.figure(
                detection_plots.curves(by_member, "iterations", "COCO AP, validation"),
                "The paper's figure 1: the members during training, mean of the folds",
            ),
            page.figure(
                plots.score_with_interval(lines[1], "mAP@0.4 of the findings"),
                "Each member alone at the end, on all images, healthy ones included",
            ),
        ),
        page.table(members, "The members with COCO's AP"),
        page.table(classes, "COCO's AP by class (paper: noise helps Infiltration)"),
        *([page.table(read(LOCATIONS), "Where the true boxes lie in the lungs")] if job.config.needs_lungs else []),
    ]


def submission(job, record):
    """Return the number of boxes in submission.csv, and pictures of the images with the highest scores."""
    found = read_parquet(job.run.path("test_decided.parquet"))
    return best_boxes(job, found[found["class_id"] != NO_FINDING], CLASSES)


def show_predictions(submission, folder=None, count=4):
    """Show the test images with the highest scores, with boxes; folder: other images to use instead."""
    found = parse_predictions(submission)
    display_boxes(KAGGLE, found[found["class_id"] != NO_FINDING], CLASSES, count, folder=folder)
