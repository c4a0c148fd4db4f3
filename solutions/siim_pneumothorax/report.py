"""The page of a run: what was found so far, and how good it is."""

import cv2
import numpy as np
import pandas as pd

from common.metrics.classification import confusion_counts
from common.paths import read_csv, read_json
from common.post.rle import paint, parse
from common.report import page, plots, sections
from common.report.gallery import gallery
from common.tuning import Rule
from solutions.siim_pneumothorax.config import SIZE
from solutions.siim_pneumothorax.data import mask


def write_report(context, data):
    """Write report.html of the run from whatever is there; parts that are missing are left out or said to be."""
    run = context.run
    parts = [_headline(context, data), _data(data), *sections.training(context)]
    if run.path("oof_dice.parquet").is_file():
        oof = pd.read_parquet(run.path("oof_dice.parquet"))
        rule = Rule(**read_json(run.path("tuned.json"))["rule"])
        parts += [_decision(run, oof, rule), _presence(context, data, oof, rule), _gallery(context, data, oof)]
    parts.append(sections.learning_rates(run))
    if run.path("ablation.csv").is_file():
        parts.append(_ablation(read_csv(run.path("ablation.csv"))))
    if run.path("submission.csv").is_file():
        parts.append(_submission(run, data))
    parts.append(sections.about(run))
    title = f"SIIM pneumothorax, preset {context.preset}"
    page.write_page(
        run.path("report.html"), title, f"run {run.folder.name}", [part for part in parts if part is not None]
    )


def _headline(context, data):
    path = context.run.path("score.json")
    notes = [note for note in [sections.synthetic(context)] if note]
    if (data.table["patient_id"] == "").all():
        notes.append(
            page.note("No map from image to patient: a patient may lie in two folds, scores may flatter.", "warning")
        )
    if not path.is_file():
        return page.join(*notes, page.note("No score yet: the run has not come to that."))
    score = read_json(path)
    dice = score["dice"]
    cards = [
        ("Dice, out of fold", dice["estimate"], f"95 % interval {dice['low']:.4f}–{dice['high']:.4f}"),
        ("Dice of empty masks", score["dice_all_empty"], "what predicting nothing scores"),
    ]
    if score["dice_positive"]:
        positive = score["dice_positive"]
        hint = f"{positive['low']:.4f}–{positive['high']:.4f}, {score['positive']} images"
        cards.append(("Dice where there is one", positive["estimate"], hint))
    if "presence" in score:
        cards.append(
            ("AUROC of presence", score["presence"]["auroc"], f"MCC {page.as_text(score['presence']['mcc'])} at 0.5")
        )
    flattery = score["dice_not_nested"] - dice["estimate"]
    notes.append(
        page.note(
            f"Each part of the {score['images']} out-of-fold images is scored by a rule chosen on the others "
            f"({score['nested_by']}). Chosen and scored on the same images, the figure would be "
            f"{score['dice_not_nested']:.4f}, {flattery:+.4f}."
        )
    )
    return page.join(page.cards(cards), *notes)


def _data(data):
    table = data.table
    train = table[table["split"] == "train"]
    folds = (
        train.groupby("fold")
        .agg(
            images=("row", "size"),
            positive=("present", "sum"),
            patients=("patient_id", "nunique"),
            median_area=("area", lambda a: float(np.median(a[a > 0])) if (a > 0).any() else np.nan),
        )
        .reset_index()
    )
    areas = {"masks": 100 * train.loc[train["area"] > 0, "area"].to_numpy() / SIZE**2}
    return page.section(
        "Data",
        f"{len(train):,} labelled images, {int(train['present'].sum()):,} with pneumothorax; "
        f"{int((table['split'] == 'test').sum()):,} to predict.",
        page.table(folds, "Folds, stratified by presence and mask-size quartile"),
        page.figure(plots.histogram(areas, "mask area, % of the image"), "How much of the image the masks cover"),
    )


def _decision(run, oof, rule):
    tuned = read_json(run.path("tuned.json"))
    parts = [{"chosen for": f"part {part}", **values} for part, values in tuned["fold_rules"].items()]
    table = pd.DataFrame([*parts, {"chosen for": "the submission", **tuned["rule"]}])
    constant = [c for c in table.columns if table[c].nunique() == 1 and table[c].iloc[0] in (0, False)]
    fragments = [page.table(table.drop(columns=constant), "Decision rules, chosen on out-of-fold predictions")]
    if run.path("surface.csv").is_file():
        surface = read_csv(run.path("surface.csv"))
        x, y, chosen = ("pixel", "min_area", (rule.pixel, rule.min_area))
        if rule.min_pixels:
            x, y, chosen = "top", "min_pixels", (rule.top, rule.min_pixels)
        if surface[x].nunique() > 1 or surface[y].nunique() > 1:
            caption = "Mean dice over all out-of-fold images, best over the other settings"
            fragments.append(page.figure(plots.threshold_surface(surface, x, y, "dice", chosen), caption))
        if surface["gate"].nunique() > 1:
            best = surface.groupby("gate")["dice"].max()
            drawn = plots.line_with_peak(best.index.to_numpy(), best.to_numpy(), "gate", "dice", rule.gate)
            fragments.append(page.figure(drawn, "Dice against the presence probability asked for"))
    positive = oof["present"] > 0
    groups = {"with": oof.loc[positive, "dice"], "without": oof.loc[~positive, "dice"]}
    fragments.append(page.figure(plots.histogram(groups, "dice of an image", 20), "Dice by presence of a pneumothorax"))
    return page.section("Decision", *fragments)


def _presence(context, data, oof, rule):
    if context.config.presence == "none" or oof["present"].nunique() < 2:
        return None
    present, probs = oof["present"].to_numpy(), oof["presence"].to_numpy(float)
    cut = rule.gate or 0.5
    tp, fp, fn, tn = (int(c) for c in confusion_counts(present, probs, cut))
    matrix = plots.confusion_matrix(np.array([[tn, fp], [fn, tp]]), ["none", "pneumothorax"])
    groups = {"none": probs[present == 0], "pneumothorax": probs[present == 1]}
    return page.section(
        "Presence",
        page.grid(
            page.figure(matrix, f"Out of fold, at the probability {cut:g}"),
            page.figure(plots.roc_curve(present, probs), "ROC curve, out of fold"),
            page.figure(plots.histogram(groups, "probability", threshold=cut), "Probabilities by truth"),
        ),
    )


def _gallery(context, data, oof, count=4):
    run, connectivity = context.run, context.config.decision.connectivity
    probs = np.load(run.path("oof_probs.npy"), mmap_mode="r")
    tuned = read_json(run.path("tuned.json"))["fold_rules"]
    rule_of = {part: Rule(**values) for part, values in tuned.items()}
    positive = oof[oof["present"] > 0].sort_values("dice", kind="stable")
    healthy = oof[(oof["present"] == 0) & (oof["dice"] < 1)].sort_values("presence", ascending=False)
    middle = max(0, len(positive) // 2 - count // 2)
    groups = {
        "Best": positive.iloc[::-1][:count],
        "Median": positive.iloc[middle : middle + count],
        "Worst": positive[:count],
        "Found where there is none": healthy[:count],
    }
    fragments = ["Green: the radiologists' outline. Orange: ours, by the rule that was chosen on the other parts."]
    for title, rows in groups.items():
        items = [
            _item(data, probs[position], row, rule_of[str(row["part"])], connectivity)
            for position, row in rows.iterrows()
        ]
        if items:
            fragments.append(gallery(items, title))
    return page.section("Pictures", *fragments)


def _item(data, probs, row, rule, connectivity):
    image = np.asarray(data.store.images[row["row"]])
    side = image.shape[0]
    predicted = rule.apply(np.asarray(probs), row["presence"], connectivity=connectivity)
    masks = [cv2.resize(m, (side, side), interpolation=cv2.INTER_AREA) for m in (mask(data, row["row"]), predicted)]
    return image, *masks, f"{row['image_id'][-24:]}: dice {row['dice']:.3f}, presence {row['presence']:.2f}"


def _ablation(table):
    rows = [(row.setting, row.dice, row.low, row.high) for row in table.itertuples()]
    four = dict.fromkeys(("dice", "low", "high", "change", "mcc", "paper"), ".4f") | {"p": ".3f"}
    return page.section(
        "Ablation",
        "The paper's comparisons on the out-of-fold images of this run, one change at a time.",
        page.table(
            table,
            "Mean dice with 95 % patient-level intervals; change: to the paper's choice, paired, with its p-value; "
            "mcc: of the gate at 0.5; paper: its private score",
            four,
        ),
        page.figure(plots.score_with_interval(rows, "dice"), "Dice with its interval"),
    )


def _submission(run, data):
    rows = read_csv(run.path("submission.csv"), dtype=str, keep_default_na=False)
    found = rows[rows["EncodedPixels"] != "-1"]
    by_id = data.table.set_index("image_id")["row"]
    items = []
    for image_id, rle in found.head(8).itertuples(index=False):
        image = np.asarray(data.store.images[by_id[image_id]])

        mask = cv2.resize(paint(parse(rle), (SIZE, SIZE), order="C"), image.shape[::-1], interpolation=cv2.INTER_AREA)
        items.append((image, None, mask, image_id[-24:]))
    text = f"{len(rows):,} rows, {len(found):,} of them with a mask ({len(found) / max(len(rows), 1):.1%}). Validated."
    hidden = run.manifest["steps"].get("submit", {}).get("hidden")
    if hidden:
        text += f" Dice on the sample's hidden labels {hidden['value']:.4f}; empty masks {hidden['nothing']:.4f}."
    fragments = [text]
    return page.section("Submission", *fragments, gallery(items, "First test images with a mask") if items else "")
