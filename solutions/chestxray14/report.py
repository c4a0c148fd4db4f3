"""The page of a run: what was found so far, and how good it is."""

import cv2
import numpy as np
import pandas as pd

from common.paths import read_array, read_json, read_parquet
from common.report import page, plots, sections
from common.report.gallery import box_overlay, gallery, outline_overlay
from solutions.chestxray14.config import BOX_SIDE, LABELS, PUBLISHED

SHOWN = 8  # pictures of a gallery


def write_report(context, data, tuned):
    """Write report.html of the run from whatever is there; parts that are missing are left out or said to be.

    tuned: whether the figures in the run are those of its present networks and settings.
    """
    run = context.run
    parts = [_headline(context, data, tuned), _data(data), _lungs(data), *sections.training(context)]
    if tuned:
        parts += [_classes(run, data, "oof", "Out of fold"), _classes(run, data, "test", f"Scores {data.test_name}"),
                  _operating(run, data), _gallery(run, data)]  # fmt: skip
    if run.path("localisation.html").is_file():
        parts.append(
            page.section("Localisation", page.link("localisation.html", "class activation maps against boxes"))
        )
    if tuned and (run.step("submit") or {}).get("rows") and run.path("submission.csv").is_file():
        parts.append(_submission(run))
    parts.append(sections.about(run))
    title = f"ChestX-ray14, preset {context.preset}"
    page.write_page(run.path("report.html"), title, f"run {run.folder.name}", [p for p in parts if p is not None])


def _headline(context, data, tuned):
    run, notes = context.run, [note for note in [sections.synthetic(context)] if note]
    if not tuned:
        return page.join(*notes, page.note("No score of these networks and settings: `tune` has not been run."))
    score = read_json(run.path("score.json"))
    cards = []
    for name, said in (("oof", "out of fold"), ("test", data.test_name)):
        if score[name]:
            mean, part = score[name]["mean"], score[name]
            cards.append((f"Mean AUROC {said}", mean["estimate"],
                          f"95 % interval {mean['low']:.4f}–{mean['high']:.4f}, {part['images']:,} images of "
                          f"{part['patients']:,} patients, {part['classes']} classes"))  # fmt: skip
    notes.append(page.note(data.official["said"]))
    return page.join(page.cards(cards), *notes)


def _data(data):
    table = data.table
    train, test = table[table["split"] == "train"], table[table["split"] == "test"]
    known = test[(test[list(LABELS)] >= 0).all(axis=1)]
    boxes = np.bincount(data.boxes["label"], minlength=len(LABELS)) if len(data.boxes) else np.zeros(len(LABELS), int)
    counts = pd.DataFrame({"label": LABELS, "train": train[list(LABELS)].sum().to_numpy(),
                           "test": known[list(LABELS)].sum().to_numpy(), "boxes": boxes})  # fmt: skip
    healthy = (train[list(LABELS)].sum(axis=1) == 0).sum(), (known[list(LABELS)].sum(axis=1) == 0).sum()
    counts.loc[len(counts)] = ["No Finding (no class)", *map(int, healthy), 0]
    folds = train.groupby("fold").agg(images=("row", "size"), patients=("patient_id", "nunique")).reset_index()
    folds["finding"] = (
        train.groupby("fold")[list(LABELS)].apply(lambda part: int((part.sum(axis=1) > 0).sum())).to_numpy()
    )
    return page.section(
        "Data",
        f"{len(train):,} images of {train['patient_id'].nunique():,} patients to learn from; {len(test):,} to predict, "
        f"{len(known):,} of them labelled.",
        page.grid(page.table(counts, "Images of each label"), page.table(folds, "Folds, by patient and all labels")),
    )


def _lungs(data):
    if data.lungs is None:
        return None
    rules = data.lungs["rule"].value_counts().rename_axis("lungs").reset_index(name="images")
    area = plots.histogram({"images": 100 * data.lungs["area"]}, "lungs, % of the image")
    fragments = [page.table(rules, "How the lungs were found"), page.figure(area, "Area")]
    items, masks = [], read_array(data.masks)
    for row in data.lungs["row"].to_numpy()[:: max(1, len(data.lungs) // SHOWN)][:SHOWN]:
        mask = cv2.resize(masks[row], data.store.images.shape[1:], interpolation=cv2.INTER_LINEAR) >= 128
        items.append((np.asarray(data.store.images[row]), None, mask, data.table["image_id"][row]))
    drawn = gallery(items, "The region that counts", overlay=outline_overlay)
    return page.section("Lungs", page.grid(*fragments), drawn)


def _scored(run, data, name):
    table = read_parquet(run.path(f"{name}.parquet"))
    truth = data.labels(data.rows_of(table["image_id"]))
    known = ~np.isnan(truth).any(axis=1)
    return truth[known], table.loc[known, list(LABELS)].to_numpy(), table[known]


def _classes(run, data, name, title):
    classes = pd.read_csv(run.path("classes.csv"))
    classes = classes[classes["split"] == name].drop(columns="split")
    if not len(classes):
        return None
    truth, probs, _ = _scored(run, data, name)
    rows = list(classes[["label", "auroc", "low", "high"]].itertuples(index=False, name=None))
    four = dict.fromkeys(("auroc", "low", "high", "delong_low", "delong_high"), ".4f")
    fragments = [page.grid(page.figure(plots.score_with_interval(rows, "AUROC", 0.5), "With intervals by patient"),
                           page.figure(plots.roc_curve(truth, probs, LABELS), "ROC curves")),
                 page.details("Table, with DeLong's intervals too", page.table(classes, "", four))]  # fmt: skip
    if name == "test":
        known = pd.DataFrame(PUBLISHED.items(), columns=["published", "mean AUROC"])
        fragments.append(page.details("What papers report on the whole official test list",
                                      page.table(known, "", {"mean AUROC": ".4f"})))  # fmt: skip
    return page.section(title, *fragments)


def _operating(run, data):
    points = pd.read_csv(run.path("operating_points.csv"))
    truth, probs, _ = _scored(run, data, "oof")
    three = dict.fromkeys(points.columns.drop("label"), ".3f")
    positive, values = truth.ravel() > 0, probs.ravel()
    groups = {"without": values[~positive], "with": values[positive]}
    return page.section(
        "Operating points and calibration",
        "Thresholds by Youden's index; sensitivity and specificity of each fold at the threshold of the others.",
        page.table(points, "Of each label", three),
        page.grid(page.figure(plots.reliability(truth.ravel(), probs.ravel()), "Reliability, all labels together"),
                  page.figure(plots.histogram(groups, "probability"), "Probabilities with and without the label")),
    )  # fmt: skip


def _gallery(run, data):
    truth, probs, table = _scored(run, data, "oof")
    right, wrong = [], []
    for k, label in enumerate(LABELS):
        order = np.argsort(-probs[:, k])
        for chosen, hits in ((right, truth[order, k] > 0), (wrong, truth[order, k] == 0)):
            if hits.any():
                at = order[np.argmax(hits)]
                chosen.append((table["image_id"].iloc[at], k, f"{label} {probs[at, k]:.2f}"))
    return page.section(
        "Pictures",
        "The surest right answer of each label and the surest wrong one, out of fold; boxes where NIH drew them.",
        gallery([_item(data, *each) for each in right], "Right", overlay=box_overlay),
        gallery([_item(data, *each) for each in wrong], "Wrong", overlay=box_overlay),
    )


def _item(data, image_id, label, text):
    row = data.rows_of([image_id])[0]
    image = np.asarray(data.store.images[row])
    boxes = data.boxes[(data.boxes["row"] == row) & (data.boxes["label"] == label)]
    corners = boxes[["x_min", "y_min", "x_max", "y_max"]].to_numpy() * (image.shape[0] / BOX_SIDE)
    return image, [(box, LABELS[label]) for box in corners], [], f"{text} · {image_id}"


def _submission(run):
    step = run.step("submit")
    text = f"{step['rows']:,} rows. Validated."
    if step["hidden"]:
        text += f" Mean AUROC on the sample's test list {step['hidden']['value']:.4f}."
    table = pd.read_csv(run.path("submission.csv"))
    groups = {label: table[label].to_numpy() for label in LABELS[:4]}
    return page.section("Submission", text, page.figure(plots.histogram(groups, "probability"), "Four of the labels"))
