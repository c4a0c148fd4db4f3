"""Report sections specific to ChestX-ray14: AUROCs by class and view, operating points and pictures."""

import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from common.kaggle.session import display_gallery, read_images
from common.paths import read_array, read_csv, read_json
from common.post.boxes import BOX
from common.report import class_plots, page, plots, results
from common.report.frame import step_section
from common.report.gallery import box_overlay, gallery, outline_overlay
from common.submit.table import read_table
from solutions.chestxray14 import comparison
from solutions.chestxray14.config import BOX_SIDE, KAGGLE, LABELS
from solutions.chestxray14.data import BOX_TABLE, LUNG_TABLE
from solutions.chestxray14.labels import AGES, GROUPS, LISTS
from solutions.chestxray14.leaks import seen_unlabelled
from solutions.chestxray14.published import TABLE_1, TOTALS, published_means, table_1

TITLE = "ChestX-ray14"
MOST = 8  # maximum number of pictures in a gallery


def headline(job, score):
    """Return the mean AUROCs as cards, and notes on weights, labels and the official split."""
    cards = []
    for name, where in (("oof", "out of fold"), ("test", job.images.about["test_name"])):
        if part := score[name]:
            size = f"{part['images']:,} images of {part['patients']:,} patients, {part['classes']} classes"
            hint = f"{page.range_text(part['mean'])}, {size}"
            cards.append((f"Mean AUROC {where}", part["mean"]["estimate"], hint))
    seen = [page.note(line, "warning") for line in seen_unlabelled(job.config, job.run)]
    return [page.cards(cards), *seen, page.note(re.sub(r"sha256 \w+, |, sha256 \w+", "", job.images.about["said"]))]


def sections(job):
    """Return data, lungs and maps and, if results are current, classes, operating points, subgroups and pictures."""
    parts = [_data(job.images), _lungs(job.images)]
    if job.is_current("tune"):
        tested = _classes(job, "test", f"Scores {job.images.about['test_name']}")
        parts += [_classes(job, "oof", "Out of fold"), tested, _operating_points(job), _groups(job), *_pictures(job)]
    link = page.link("localisation.html", "Class activation maps against the true boxes")
    return [*parts, step_section(job, "localise", "Localisation", lambda job: [link])]


def _data(images):
    labels, train = list(LABELS), images.table[images.table["split"] == "train"]
    test = images.table[images.table["split"] == "test"]
    known = test[(test[labels] >= 0).all(axis=1)]
    counts = count_labels(train[labels], known[labels], images.tables[BOX_TABLE]["label"])
    found = train.assign(finding=train[labels].sum(axis=1) > 0)
    folds = results.fold_table(found, patients=("patient_id", "nunique"), finding=("finding", "sum"))
    return page.section(
        "Data",
        f"{len(train):,} images of {train['patient_id'].nunique():,} patients for training; {len(test):,} to predict, "
        f"{len(known):,} of them labelled.",
        page.grid(page.table(counts, "Images by label"), page.table(folds, "Folds, by patient and all labels")),
    )


def count_labels(train, test, boxes):
    """Return CXR-IRNet's table 1 for these images, with the paper's counts beside ours.

    train, test: labels 0/1 (n, 14); boxes: their labels, 0 to 13. The last rows are the total of all labels (an image
    can have several), images with a finding, images without, and all images. For boxes, boxes are counted, not images.
    """
    columns = {"label": [*LABELS, *TOTALS]}
    for name, part in (("train", train), ("test", test)):
        columns[name] = table_1(part.sum().tolist(), int((part.sum(axis=1) > 0).sum()), len(part))
    columns["boxes"] = table_1(np.bincount(boxes.astype(int), minlength=len(LABELS)).tolist(), len(boxes), len(boxes))
    return pd.DataFrame(columns | {f"paper: {name}": values for name, values in TABLE_1.items()})


def _lungs(images):
    """Return the section on lungs: how they were found, masks that weight features, and boxes with their crops."""
    if LUNG_TABLE not in images.tables:
        return None
    lungs, pixels, names = images.tables[LUNG_TABLE], images.store.images, images.table.set_index("row")["image_id"]
    rules = lungs["rule"].value_counts().rename_axis("lungs").reset_index(name="images")
    rules["share"] = (rules["images"] / len(lungs)).map("{:.2%}".format)
    area = page.figure(plots.histogram({"images": 100 * lungs["area"]}, "lungs, % of the image"), "Area of the lungs")
    fragments = [page.grid(page.table(rules, "How the lungs were found"), area)]
    lungs = lungs[lungs["row"].isin(names.index)]  # leave out images that could not be read
    if "masks" in images.arrays:
        items, masks = [], read_array(images.arrays["masks"])
        for row in lungs["row"].iloc[:: max(1, len(lungs) // MOST)][:MOST]:
            mask = cv2.resize(masks[row], pixels.shape[1:], interpolation=cv2.INTER_LINEAR) >= 128
            items.append((pixels[row], None, mask, names[row]))
        title = f"Region that weights the features: {' and '.join(images.about['structures'])}"
        fragments.append(gallery(items, title, overlay=outline_overlay))
    if "crops" in images.arrays:
        items, crops = [], read_array(images.arrays["crops"])
        per_rule = max(1, MOST // (2 * lungs["rule"].nunique()))
        for found in lungs.groupby("rule", sort=False).head(per_rule).itertuples():
            sides = images.at([found.row])[["width", "height", "width", "height"]].to_numpy(float)[0]
            box = np.array([getattr(found, edge) for edge in BOX]) / sides * pixels.shape[1]
            items.append((pixels[found.row], None, [(box, "")], f"{names[found.row]}: {found.rule}"))
            items.append((crops[found.row], None, None, "its crop"))
        title = "Boxes of the lungs, by how they were found, and the crops that the lung network sees"
        fragments.append(gallery(items, title, overlay=box_overlay))
    return page.section("Lungs", *fragments)


def _classes(job, name, title):
    classes = read_csv(job.run.path("classes.csv"), ["split", "label", "auroc"])
    classes = classes[classes["split"] == name].drop(columns="split")
    if not len(classes):
        return None
    tables, fragments = comparison.results(job, name), []
    if read_json(job.run.path("score.json"))[name].get("epoch_chosen_on_these"):
        fragments.append(page.note("The epoch was chosen on these images, which inflates these scores.", "warning"))
    answer = {"fusion": "fused", "mean": "mean"}[job.config.combine] if job.config.views == "both" else "run"
    probs = {end.removeprefix(": ") or answer: comparison.values_of(table)[2] for end, table in tables.items()}
    truth = comparison.values_of(tables[""])[1]
    rows = classes[["label", "auroc", "low", "high"]].itertuples(index=False)
    fragments += [
        page.figure(plots.score_with_interval(rows, "AUROC", 0.5), f"AUROC with intervals by patient; {plots.FEW}"),
        page.figure(class_plots.roc_panels(truth, probs, LABELS), "ROC curves with their areas"),
        page.details("Table, with DeLong's intervals", page.table(classes)),
    ]
    if name == "test":
        published = page.table(published_means())
        fragments.append(page.details("Published results on the whole official test list", published))
    return page.section(title, *fragments)


def _operating_points(job):
    table, folds = comparison.results(job, "oof")[""], len(job.config.folds)
    _, truth, probs = comparison.values_of(table)
    text = (
        f"They hold for the probabilities of single networks. Test images get the mean of {folds} networks, which "
        "varies less, so the same thresholds may give other rates there."
    )
    drawn = results.classes(truth, probs, table["fold"].to_numpy(), LABELS, patients=table["patient_id"].to_numpy())
    return page.section("Operating points and calibration", *[text] * (folds > 1), *drawn)


def _groups(job):
    """Return the mean AUROC of each sex, age group and view, with intervals by patient."""
    rows = []
    for split, where in (("oof", "out of fold"), ("test", "test")):
        table = comparison.results(job, split)[""]
        for name in GROUPS:
            groups = dict(list(table[table[name] != ""].groupby(name)))
            for value in sorted(groups, key=lambda value: (AGES.index(value) if value in AGES else 0, value)):
                if found := comparison.score_part(groups[value], job.config.seed):
                    rows.append({"": where, "group": f"{name} {value}", **found[1], **found[1]["mean"]})
    text = (
        "The mean AUROC over the classes that have positive and negative images in the group; compare only rows with "
        "equally many classes."
    )
    return page.section("Subgroups", text, page.table(pd.DataFrame(rows).drop(columns="mean"))) if rows else None


def _pictures(job):
    """Return the sections with the worst errors and with further pictures."""
    table, where = comparison.results(job, "test")[""], job.images.about["test_name"]
    if not len(table):
        table, where = comparison.results(job, "oof")[""], "out of fold"
    right, wrong = confident_galleries(job.images, table)
    text = f"Each label's most confident {{}} prediction {where}, with boxes where NIH drew them."
    _, truth, probs = comparison.values_of(table)
    errors = np.abs(truth - probs)
    at, worst = np.arange(len(table)), errors.argmax(1)
    listed = table[["image_id"]].assign(label=np.take(LABELS, worst), present=truth[at, worst].astype(int))
    listed = listed.assign(probability=probs[at, worst]).iloc[np.argsort(-errors[at, worst], kind="stable")]
    further = page.section("Pictures", text.format("right"), right)
    return [results.worst_errors(listed, text.format("wrong"), wrong), further]


def confident_galleries(images, table):
    """Return two galleries of a table of `results`: each label's most confident right and wrong predictions."""
    chosen, boxes = {"right": [], "wrong": []}, images.tables[BOX_TABLE]
    _, truth, probs = comparison.values_of(table)
    for title, at, k in results.most_confident(truth, probs):
        row = images.rows_of([table["image_id"].iloc[at]])[0]
        mine = boxes.loc[(boxes["row"] == row) & (boxes["label"] == k), BOX].to_numpy(float)
        true = [(box * images.store.images.shape[1] / BOX_SIDE, LABELS[k]) for box in mine]
        caption = f"{LABELS[k]} {probs[at, k]:.2f} · {images.ids([row])[0]}"
        chosen[title].append((images.store.images[row], true, [], caption))
    return [gallery(items, title.capitalize(), overlay=box_overlay) for title, items in chosen.items()]


def submission(job, record):
    """Return a histogram of the submitted probabilities."""
    return [results.submitted_probabilities(job)]


def show_predictions(submission, folder=None, count=4):
    """Show the images with the most certain findings, and their three highest probabilities; folder: of the images."""
    table = read_table(submission)
    probs = table[list(LABELS)].astype(float)
    best = probs.max(axis=1).nlargest(count).index
    names = table["Image Index"].map(lambda name: Path(name).stem)
    images = read_images(KAGGLE, names[best], None, (*KAGGLE.samples, *LISTS["test"]), folder)
    items = []
    for row in best:
        text = ", ".join(f"{label} {value:.2f}" for label, value in probs.loc[row].nlargest(3).items())
        items.append((images[names[row]], None, None, f"{names[row]}: {text}"))
    display_gallery(items)
