"""The page of a run: how good its masks are, where they fail, and how they look on images from elsewhere."""

import numpy as np
import pandas as pd

from common.paths import read_array, read_csv, read_json, read_parquet
from common.report import page, plots, sections
from common.report.gallery import gallery
from common.steps import read_predictions
from solutions.lung_segmentation.data import mask
from solutions.lung_segmentation.postprocess import MaskRule

# Dice that others published on these collections: a comparison of orders, their splits are not ours.
PUBLISHED = (
    ("Shenzhen", "EAM-Net", 0.961),
    ("Montgomery", "EAM-Net", 0.982),
    ("Montgomery", "imlab-uiip", 0.972),
    ("both", "Berger et al.", 0.979),
)


def write_report(context):
    """Write report.html of the run from whatever is there; parts that are missing are left out or said to be."""
    run, data = context.run, context.images
    parts = [_headline(context), _data(context, data), *sections.training(context)]
    if context.is_current("tune"):
        oof = read_parquet(run.path("oof_dice.parquet"))
        parts += [_scores(run), _decision(run), _gallery(context, data, oof)]
    if context.run.step("find_lr"):
        parts.append(sections.learning_rates(run))
    for step, name, section in (("ablate", "ablation", _ablation), ("cross", "cross", _cross)):
        if context.is_current(step):
            parts.append(section(read_csv(run.path(f"{name}.csv"))))
    if context.is_current("submit"):
        parts.append(_submission(context, data))
    parts.append(sections.about(run))
    title = f"Lung segmentation, preset {context.preset}"
    page.write_page(run.path("report.html"), title, f"run {run.folder.name}", [p for p in parts if p is not None])


def _headline(context):
    run, notes = context.run, [sections.synthetic(context)]
    notes = [note for note in notes if note]
    if not context.is_current("tune"):
        return page.join(*notes, page.note("No score yet: the run has not come to that."))
    score = read_json(run.path("score.json"))
    cards = [
        ("Dice, mean over images", score["dice"]["estimate"], f"{_range(score['dice'])}, {score['images']} images"),
        ("Dice, pooled pixels", score["dice_pooled"]["estimate"], f"95 % interval {_range(score['dice_pooled'])}"),
    ]
    cards += [
        (f"Dice, {name}", part["dice"]["estimate"], f"{_range(part['dice'])}, {part['images']} images")
        for name, part in score["datasets"].items()
        if len(score["datasets"]) > 1
    ]
    folds = ", ".join(map(str, score["folds"]))
    held = f"Held-out images (fold {folds} of {score['n_folds']}, seed {score['seed']}), at their own sizes."
    return page.join(page.cards(cards), *notes, page.note(held))


def _range(interval):
    return f"{interval['low']:.4f}–{interval['high']:.4f}"


def _data(context, data):
    table = data.table
    train = table[table["split"] == "train"]
    counts = train.groupby(["fold", "dataset"]).size().unstack(fill_value=0).reset_index()
    areas = {name: 100 * part["area"].to_numpy() for name, part in train.groupby("dataset")}
    fragments = [
        f"{len(train):,} images with masks, {int((table['split'] == 'test').sum()):,} to predict.",
        page.grid(
            page.table(counts, "Images of each fold, split by patient"),
            page.figure(plots.histogram(areas, "lung area, % of the image"), "How much of the image is lung"),
        ),
    ]
    left_out = context.run.path("left_out.csv")
    if left_out.is_file():
        bad = read_csv(left_out, dtype=str)
        fragments.insert(1, page.note(f"{len(bad)} images could not be used.", "warning"))
        fragments.append(page.table(bad, "Images that could not be used"))
    return page.section("Data", *fragments)


def _scores(run):
    score, rows = read_json(run.path("score.json")), []
    groups = {"all": score, **score["datasets"], **score["structures"]}
    for name, part in groups.items():
        for form, suffix in (("mean over images", ""), ("pooled pixels", "_pooled")):
            dice = part["dice" + suffix]
            values = {m: part[m + suffix]["estimate"] for m in ("iou", "precision", "recall", "accuracy")}
            shown = f"{dice['estimate']:.4f} ({_range(dice)})"
            rows.append({"of": name, "images": part["images"], "as": form, "dice": shown, **values})
    lines = [(name, *part["dice"].values()) for name, part in groups.items()]
    fragments = [page.figure(plots.score_with_interval(lines, "dice"), "Dice, mean over images")]
    if not run.manifest["steps"]["prepare"]["synthetic"]:
        published = pd.DataFrame(PUBLISHED, columns=["dataset", "by", "dice"])
        fragments.append(page.table(published, "Published on these collections, with other splits", {"dice": ".3f"}))
    four = dict.fromkeys(("iou", "precision", "recall", "accuracy"), ".4f")
    table = page.table(pd.DataFrame(rows), "Held-out images, 95 % intervals over patients", four)
    return page.section("Scores", table, page.grid(*fragments))


def _decision(run):
    tuned = read_json(run.path("tuned.json"))
    surface = read_csv(run.path("surface.csv"))
    if len(surface) < 2:
        return None
    rule = tuned["rule"]
    figure = plots.threshold_surface(surface, "pixel", "regions", "dice", (rule["pixel"], rule["regions"]))
    kept = f"the {rule['regions']} largest regions" if rule["regions"] else "all regions"
    text = f"Pixels from {rule['pixel']:g} on; {kept}. Each part of the images is scored by the others' choice."
    return page.section("Decision", text, page.figure(figure, "Mean dice of every rule that was tried"))


def _gallery(context, data, oof, count=4):
    probs = read_array(context.run.path("oof_probs.npy"))
    rule = MaskRule(**read_json(context.run.path("tuned.json"))["rule"])
    ordered = oof.reset_index(drop=True).sort_values("dice", kind="stable")
    middle = max(0, len(ordered) // 2 - count // 2)
    groups = {"Worst": ordered[:count], "Median": ordered[middle : middle + count], "Best": ordered[::-1][:count]}
    fragments = ["Green: the outline drawn by hand. Orange: ours, by the rule of the submission."]
    for title, rows in groups.items():
        items = []
        for position, row in rows.iterrows():
            image = np.asarray(data.store.images[row["row"]])
            truth = np.asarray(mask(data, row["row"]))[:2].max(0)
            drawn = rule.lungs(np.asarray(probs[position]), image.shape, context.config.structures)
            items.append((image, truth, drawn, f"{row['image_id']}: dice {row['dice']:.3f}"))
        fragments.append(gallery(items, title))
    return page.section("Pictures", *fragments)


def _ablation(table):
    rows = [
        (f"{row.augmentation}, {form}", *(getattr(row, f"dice{suffix}{end}") for end in ("", "_low", "_high")))
        for row in table.itertuples()
        for form, suffix in (("mean", ""), ("pooled", "_pooled"))
    ]
    shown = pd.DataFrame(
        [
            {
                "augmentation": row["augmentation"],
                "as": form,
                **{
                    m: f"{row[m + s]:.4f} [{row[m + s + '_low']:.4f}–{row[m + s + '_high']:.4f}]"
                    for m in ("dice", "precision", "recall", "accuracy")
                },
            }
            for _, row in table.iterrows()
            for form, s in (("mean over images", ""), ("pooled pixels", "_pooled"))
        ]
    )
    paper = table[["augmentation", *(c for c in table.columns if c.startswith("paper_"))]]
    change = table["dice_change"].dropna()
    text = f"Complex against simple: dice {change.iloc[0]:+.4f}, paired, p = {table['p'].dropna().iloc[0]:.3f}."
    return page.section(
        "Ablation: simple and complex augmentation",
        text,
        page.table(shown, "Held-out images, 95 % intervals over patients"),
        page.grid(
            page.figure(plots.score_with_interval(rows, "dice"), "Dice"),
            page.table(paper, "Berger et al., table 2", dict.fromkeys(paper.columns[1:], ".3f")),
        ),
    )


def _cross(table):
    rows = [(f"{row.trained} → {row.tested}", row.dice, row.dice_low, row.dice_high) for row in table.itertuples()]
    shown = table[["trained", "trained_on", "tested", "images", "dice", "dice_low", "dice_high", "dice_pooled"]]
    four = dict.fromkeys(("dice", "dice_low", "dice_high", "dice_pooled"), ".4f")
    return page.section(
        "Across datasets",
        "Trained on one collection, scored on the others; all: trained on every one.",
        page.grid(
            page.figure(plots.score_with_interval(rows, "dice"), "Dice, mean over images"),
            page.table(shown, "Mean over images and pooled pixels", four),
        ),
    )


def _submission(context, data):
    run = context.run
    record = run.manifest["steps"].get("submit", {})
    text = f"{record.get('rows', 0):,} masks, in masks/ and as run-lengths in submission.csv. Validated."
    if record.get("hidden"):
        text += f" Dice on the sample's hidden masks {record['hidden']['value']:.4f}."
    if not record.get("rows"):
        return page.section("Submission", "No images to predict.")
    test, probs = read_predictions(run, "test")
    rule = MaskRule(**read_json(run.path("tuned.json"))["rule"])
    rejected = read_csv(run.path("rejected.csv"), dtype=str)
    reasons = dict(zip(rejected["image_id"], rejected["reason"], strict=True))
    text += f" {len(reasons)} of {len(test)} fail the area gate."

    def items(chosen):
        for position, row in test[chosen][:8].iterrows():
            image = np.asarray(data.store.images[row["row"]])
            drawn = rule.lungs(np.asarray(probs[position]), image.shape, context.config.structures)
            yield image, None, drawn, f"{row['image_id']} {reasons.get(row['image_id'], '')}".strip()

    failed = test["image_id"].isin(list(reasons))
    return page.section(
        "Submission",
        text,
        gallery(items(failed), "Rejected by the area gate") if reasons else "",
        gallery(items(~failed), "First masks"),
    )
