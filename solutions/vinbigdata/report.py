"""The page of a run: what was found so far, how good it is, and which mistakes cost most."""

import cv2
import numpy as np
import pandas as pd

from common.metrics.detection import evaluate, pr_curve
from common.paths import read_csv, read_json, read_parquet
from common.report import detection_plots, page, plots, sections
from common.report.gallery import box_overlay, gallery
from solutions.vinbigdata.config import CLASSES, NO_FINDING

BOX = ["x_min", "y_min", "x_max", "y_max"]
SHOWN = 5  # boxes of an image in a picture


def write_report(context, data):
    """Write report.html of the run from whatever is there; parts that are missing are left out or said to be."""
    from solutions.vinbigdata.experiments import TABLES  # they import this module
    from solutions.vinbigdata.pipeline import experiment_key, is_tuned

    run, tuned = context.run, is_tuned(context)
    parts = [_headline(context, data, tuned), _data(data), *sections.training(context)]
    if tuned:
        found = read_parquet(run.path("oof_decided.parquet"))
        rows = data.rows(folds=context.config.folds)
        parts += [_classes(run, data, found, rows), _decision(run), _healthy(run, data, rows)]
        parts.append(_gallery(run, data, found, rows))
    if run.is_done("ablation", experiment_key(context), TABLES):
        parts.append(_ablation(run))
    if tuned and run.step("submit") and run.path("test_decided.parquet").is_file():
        parts.append(_submission(run, data))
    parts.append(sections.about(run))
    title = f"VinBigData detection, preset {context.preset}"
    page.write_page(run.path("report.html"), title, f"run {run.folder.name}", [p for p in parts if p is not None])


def _headline(context, data, tuned):
    run, notes = context.run, [sections.synthetic(context)]
    if (data.table.loc[data.table["split"] == "train", "patient_id"] == "").all():
        notes.append(
            page.note("No map from image to patient: a patient may lie in two folds, scores may flatter.", "warning")
        )
    notes = [note for note in notes if note]
    if not tuned:  # the score is written with the rule
        return page.join(*notes, page.note("No score of these predictions and settings: `tune` has not been run."))
    score = read_json(run.path("score.json"))
    found = score["map"]
    cards = [
        ("mAP@0.4, out of fold", found["estimate"], f"95 % interval {found['low']:.4f}–{found['high']:.4f}"),
        ("mAP@0.4 without boxes", score["map_no_finding"], "No finding on every image"),
        (
            "AP of the findings",
            score["map_findings"],
            f"mean; that of No finding is {page.as_text(score['ap_no_finding'])}",
        ),
        ("Images", score["images"], f"{score['abnormal']} with a finding; {score['classes']} of 15 classes occur"),
        ("2CC accuracy", score["healthy"]["accuracy"], f"AUROC {page.as_text(score['healthy']['auroc'])}"),
    ]
    notes.append(
        page.note(
            f"Each part of the images is scored by a rule chosen on the others ({score['nested_by']}). Chosen and "
            f"scored on the same images, the figure would be {score['map_not_nested']:.4f}."
        )
    )
    return page.join(page.cards(cards), *notes)


def _data(data):
    train = data.table[data.table["split"] == "train"]
    sizes = data.boxes.merge(data.table[["row", "width", "height"]], on="row")
    shares = sizes[BOX].to_numpy() / sizes[["width", "height", "width", "height"]].to_numpy()
    areas = 100 * (shares[:, 2] - shares[:, 0]) * (shares[:, 3] - shares[:, 1])
    of = sizes["class_id"].to_numpy()
    counts = pd.DataFrame(
        {
            "class": CLASSES,
            "images": [*(int(train[f"c{k}"].sum()) for k in range(NO_FINDING)), int((train["abnormal"] == 0).sum())],
            "boxes": [*(int((of == k).sum()) for k in range(NO_FINDING)), ""],
            "median area, %": [float(np.median(areas[of == k])) if (of == k).any() else np.nan for k in range(15)],
        }
    )
    folds = train.groupby("fold").agg(images=("row", "size"), abnormal=("abnormal", "sum")).reset_index()
    maps = {CLASSES[k]: shares[of == k] for k in range(NO_FINDING)}
    return page.section(
        "Data",
        f"{len(train):,} images with labels, {int(train['abnormal'].sum()):,} of them with {len(data.boxes):,} boxes; "
        f"{int((data.table['split'] == 'test').sum()):,} to predict.",
        page.grid(page.table(counts, "Classes"), page.table(folds, "Folds, stratified by every class")),
        page.figure(detection_plots.location_maps(maps), "Where the boxes of each class lie"),
        page.figure(plots.histogram({"boxes": areas}, "box area, % of the image"), "Sizes of the boxes"),
    )


def _classes(run, data, found, rows):
    columns = ["name", "ap", "low", "high", "n_truth", "n_detections", "recall", "best_f1", "score_at_best_f1"]
    classes = read_csv(run.path("classes.csv"), columns)
    shown = classes[columns]
    lines = list(classes[["name", "ap", "low", "high"]].itertuples(index=False, name=None))
    images = data.table.set_index("row").loc[rows, "image_id"]
    result = evaluate(found, data.truth(rows), images)
    curves = {}
    for class_id in result.classes.index[result.classes["n_truth"] > 0]:
        curve = pr_curve(result, class_id)
        curves[CLASSES[class_id]] = curve["recall"], curve["precision"], result.classes.loc[class_id, "ap"]
    errors = read_csv(run.path("errors.csv"), ["count", "ap_gained"])
    kinds = errors[errors.columns[0]]
    three = dict.fromkeys(("ap", "low", "high", "recall", "best_f1", "score_at_best_f1"), ".3f")
    return page.section(
        "Classes",
        page.table(shown, "Average precision at IoU > 0.4, out of fold", three),
        page.grid(
            page.figure(plots.score_with_interval(lines, "AP"), "AP of each class"),
            page.figure(detection_plots.pr_curves(curves), "Precision and recall, with the AP of each class"),
            page.figure(detection_plots.bars(dict(zip(kinds, errors["count"], strict=True)), "count"), "Errors"),
            page.figure(
                detection_plots.bars(dict(zip(kinds, errors["ap_gained"], strict=True)), "mAP gained"),
                "What mending one kind of error would gain",
            ),
        ),
    )


def _decision(run):
    tuned, surface = read_json(run.path("tuned.json")), read_csv(run.path("surface.csv"), ["alpha", "beta", "map"])
    members, sweep = read_csv(run.path("members.csv")), read_csv(run.path("sweep.csv"), ["map"])
    rules = [{"chosen for": f"part {part}", **rule} for part, rule in tuned["part_rules"].items()]
    rules = pd.DataFrame([*rules, {"chosen for": "the submission", **tuned["rule"]}])
    rules["weights"] = [" ".join(f"{weight:g}" for weight in weights) for weights in rules["weights"]]
    chosen = tuned["rule"]["alpha"], tuned["rule"]["beta"]
    drawn = plots.threshold_surface(sweep, "alpha", "beta", "map", chosen)
    figures = [page.figure(drawn, "mAP over alpha and beta, all images; beta -1 is No finding on every image")]
    if surface["iou"].nunique() > 1 or surface["skip"].nunique() > 1:
        drawn = plots.threshold_surface(surface, "iou", "skip", "map", (tuned["rule"]["iou"], tuned["rule"]["skip"]))
        figures.append(page.figure(drawn, "mAP over iou and skip, best over the rest, all images"))
    return page.section(
        "Decision",
        page.table(rules, "Rules, chosen on out-of-fold boxes (beta -1: No finding on every image, the winners' rule)"),
        page.table(members, "Members: weight in the fusion, mAP of the findings alone"),
        page.grid(*figures),
    )


def _healthy(run, data, rows):
    probs = read_parquet(run.path("oof_healthy.parquet")).set_index("image_id")["healthy"]
    images = data.table.set_index("row").loc[rows]
    healthy = 1 - images["abnormal"].to_numpy()
    probs = probs[images["image_id"]].to_numpy()
    groups = {"abnormal": probs[healthy == 0], "healthy": probs[healthy == 1]}
    rule, shares = (
        read_json(run.path("tuned.json"))["rule"],
        read_json(run.path("score.json"))["healthy"]["share_above"],
    )
    shown = [
        {"images": name, **{f"above {end} {rule[end]:g}": f"{share[end]:.1%}" for end in ("alpha", "beta")}}
        for name, share in shares.items()
        if share
    ]
    return page.section(
        "Healthy or not (2CC)",
        page.grid(
            page.figure(plots.roc_curve(healthy, probs), "ROC curve, out of fold"),
            page.figure(
                plots.histogram(groups, "probability of health", threshold=rule["alpha"]),
                "Probabilities by truth; dashed: alpha",
            ),
            page.table(pd.DataFrame(shown), "Out of fold and of the test images (mean of the folds' logits)"),
        ),
    )


def _gallery(run, data, found, rows, count=8):
    probs = read_parquet(run.path("oof_healthy.parquet")).set_index("image_id")["healthy"]
    images = data.table.set_index("row").loc[rows].reset_index()
    images["health"] = probs[images["image_id"]].to_numpy()
    abnormal = images[images["abnormal"] == 1]
    step = max(1, len(abnormal) // count)
    boxes = found[found["class_id"] != NO_FINDING]
    without = images.loc[images["abnormal"] == 0, "image_id"]
    false = boxes[boxes["image_id"].isin(without)]
    worst = false.groupby("image_id")["score"].max().sort_values(ascending=False).index[: count // 2]
    lost = abnormal[~abnormal["image_id"].isin(boxes["image_id"])].sort_values("health", ascending=False)
    return page.section(
        "Pictures",
        f"At most {SHOWN} boxes an image, those of the highest scores; p is the probability of health.",
        gallery(_items(data, found, abnormal[::step][:count]), "With findings", overlay=box_overlay),
        gallery(_items(data, found, _of(images, worst)), "Boxes where nothing is", overlay=box_overlay),
        gallery(
            _items(data, found, lost[: count // 2]), "Findings given up: no box left by the rule", overlay=box_overlay
        )
        if len(lost)
        else "",
    )


def _of(images, ids):
    return images.set_index("image_id", drop=False).loc[ids]


def _items(data, found, images, known=True):
    return [_item(data, found, row, known) for _, row in images.iterrows()]


def _item(data, found, row, known):
    image = np.asarray(data.store.images[row["row"]])
    width, height = row["width"], row["height"]
    size = [max(1, round(side * 512 / max(width, height))) for side in (width, height)]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    scale = np.array([size[0] / width, size[1] / height] * 2)

    def marks(boxes, scores):
        named = []
        for k, box in enumerate(boxes.itertuples()):
            text = CLASSES[box.class_id] + (f" {scores[k]:.2f}" if scores is not None else "")
            named.append((np.array([box.x_min, box.y_min, box.x_max, box.y_max]) * scale, text))
        return named

    mine = found[(found["image_id"] == row["image_id"]) & (found["class_id"] != NO_FINDING)]
    mine = mine.sort_values("score", ascending=False)[:SHOWN]
    truth = marks(data.boxes[data.boxes["row"] == row["row"]], None) if known else None
    health = f" · p {row['health']:.3f}" if "health" in row else ""
    return image, truth, marks(mine, mine["score"].to_numpy()), row["image_id"][:16] + health


def _ablation(run):
    table, members = (read_csv(run.path(f"{name}.csv"), ["map", "low", "high"]) for name in ("ablation", "figure1"))
    rows, lines = (
        list(t[[t.columns[0], "map", "low", "high"]].itertuples(index=False, name=None)) for t in (table, members)
    )
    four = dict.fromkeys(("map", "low", "high", "findings", "gain", "gain_low", "gain_high", "paper"), ".4f")
    return page.section(
        "Ablation",
        page.table(table, "The paper's table 1, out of fold, nested; paper: its score on the test set", four),
        page.grid(
            page.figure(plots.score_with_interval(rows, "mAP@0.4"), "The paper's table 1 on these images"),
            page.figure(
                plots.score_with_interval(lines, "mAP@0.4 of the findings"),
                "The paper's figure 1: each member alone, over all images, healthy ones too",
            ),
            page.table(members, "With COCO's AP", dict.fromkeys(("map", "low", "high", "map_coco"), ".4f")),
        ),
    )


def _submission(run, data):
    found = read_parquet(run.path("test_decided.parquet"))
    findings = found[found["class_id"] != NO_FINDING]
    images = data.table[data.table["split"] == "test"]
    text = f"{len(images):,} rows, {len(findings):,} boxes on {findings['image_id'].nunique():,} images. Validated."
    hidden = run.step("submit")["hidden"]
    if hidden:
        text += f" mAP@0.4 on the sample's hidden labels {hidden['value']:.4f}; without boxes {hidden['nothing']:.4f}."
    best = findings.groupby("image_id")["score"].max().sort_values(ascending=False).index[:8]
    items = _items(data, found, _of(images, best), known=False)
    return page.section("Submission", text, gallery(items, "Highest scores", overlay=box_overlay))
