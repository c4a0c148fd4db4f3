"""Sections of the report that are ChestX-ray14's own: AUROCs by class and view, operating points and pictures."""

import re

import numpy as np
import pandas as pd

from common.metrics.classification import auroc, mean_of_defined
from common.metrics.statistics import bootstrap_auroc
from common.paths import read_csv, read_json, read_parquet
from common.report import class_plots, page, plots, results
from common.report.frame import step_section
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.data import BOX_TABLE
from solutions.chestxray14.lungs import LUNG_TABLE
from solutions.chestxray14.pictures import confident_galleries, labelled_predictions, lung_galleries, map_gallery
from solutions.chestxray14.published import TABLE_1, TOTALS, published_means, table_1

TITLE = "ChestX-ray14"
RESAMPLES = 200  # for the interval of a fold


def fold_scores(job):
    """Return the mean AUROC of each fold, see common.report.results.scores_by_fold."""
    truth, probs, table = labelled_predictions(job.run, job.images, "oof")
    groups = job.images.groups(job.images.rows_of(table["image_id"]))

    def score(chosen, mine):
        return bootstrap_auroc(truth[chosen], probs[chosen], mine, RESAMPLES, skip_undefined=True)[1]

    return results.scores_by_fold(table["fold"], groups, score)


def hints(job, score, trainings):
    """Return a hint if the network of one view has a higher mean AUROC than both views together."""
    means = _view_means(job, "oof") if job.config.views == "both" else {}
    both = means.popitem()[1] if means else None
    best = max(means, key=means.get, default=None)
    if best is None or not means[best] > both:
        return []
    return [
        f"The mean AUROC of both views together is {both:.3f}, of the network on the {best} {means[best]:.3f}: compare "
        f"`--views {best}`."
    ]


def headline(job, score):
    """Return the mean AUROCs as cards, and what is known of the official split."""
    cards = []
    for name, where in (("oof", "out of fold"), ("test", job.images.about["test_name"])):
        if part := score[name]:
            size = f"{part['images']:,} images of {part['patients']:,} patients, {part['classes']} classes"
            hint = f"{page.range_text(part['mean'])}, {size}"
            cards.append((f"Mean AUROC {where}", part["mean"]["estimate"], hint))
    return [page.cards(cards), page.note(re.sub(r"sha256 \w+, |, sha256 \w+", "", job.images.about["said"]))]


def sections(job):
    """Return data and lungs, and of the current results the classes, views, operating points, pictures and maps."""
    parts = [_data(job.images), _lungs(job.images)]
    if job.is_current("tune"):
        parts += [
            _classes(job, "oof", "Out of fold"),
            _classes(job, "test", f"Scores {job.images.about['test_name']}"),
            _views(job),
            _operating_points(job),
            *_pictures(job),
        ]
    link = page.link("localisation.html", "Class activation maps against the true boxes")
    return [*parts, step_section(job, "localise", "Localisation", lambda job: [link])]


def _data(images):
    labels, train = list(LABELS), images.table[images.table["split"] == "train"]
    test = images.table[images.table["split"] == "test"]
    known = test[(test[labels] >= 0).all(axis=1)]
    counts = count_labels(train[labels], known[labels], images.tables[BOX_TABLE]["label"])
    folds = train.assign(finding=train[labels].sum(axis=1) > 0).groupby("fold")
    folds = folds.agg(images=("row", "size"), patients=("patient_id", "nunique"), finding=("finding", "sum"))
    return page.section(
        "Data",
        f"{len(train):,} images of {train['patient_id'].nunique():,} patients for training; {len(test):,} to predict, "
        f"{len(known):,} of them labelled.",
        page.grid(
            page.table(counts, "Images by label"), page.table(folds.reset_index(), "Folds, by patient and all labels")
        ),
    )


def count_labels(train, test, boxes):
    """Return CXR-IRNet's table 1 of these images, with the paper's counts beside ours.

    train, test: labels 0/1 (n, 14); boxes: their labels, 0 to 13. Below the labels stand their totals, of which an
    image can have several, the images with and without a finding, and all images. Boxes are counted, not their images.
    """
    columns = {"label": [*LABELS, *TOTALS]}
    for name, part in (("train", train), ("test", test)):
        columns[name] = table_1(part.sum().tolist(), int((part.sum(axis=1) > 0).sum()), len(part))
    columns["boxes"] = table_1(np.bincount(boxes.astype(int), minlength=len(LABELS)).tolist(), len(boxes), len(boxes))
    return pd.DataFrame(columns | {f"paper: {name}": values for name, values in TABLE_1.items()})


def _lungs(images):
    if LUNG_TABLE not in images.tables:
        return None
    lungs = images.tables[LUNG_TABLE]
    rules = lungs["rule"].value_counts().rename_axis("lungs").reset_index(name="images")
    rules["share"] = (rules["images"] / len(lungs)).map("{:.2%}".format)
    area = plots.histogram({"images": 100 * lungs["area"]}, "lungs, % of the image")
    fragments = [page.table(rules, "How the lungs were found"), page.figure(area, "Area of the lungs")]
    return page.section("Lungs", page.grid(*fragments), *lung_galleries(images))


def _predictions(job, name, table):
    """Return the probabilities (n, 14) of the images of `table` by network: of each view and of both, or of the run."""
    config = job.config
    if config.views != "both":
        return {"run": table[list(LABELS)].to_numpy()}
    parts = {stage: read_parquet(job.run.path(f"{name}_{stage}.parquet")) for stage in config.stages}
    probs = {
        stage: part.set_index("image_id").loc[table["image_id"], list(LABELS)].to_numpy()
        for stage, part in parts.items()
    }
    return probs | {{"fusion": "fused", "mean": "mean of both"}[config.combine]: table[list(LABELS)].to_numpy()}


def _classes(job, name, title):
    classes = read_csv(job.run.path("classes.csv"), ["split", "label", "auroc"])
    classes = classes[classes["split"] == name].drop(columns="split")
    if not len(classes):
        return None
    truth, _, table = labelled_predictions(job.run, job.images, name)
    part, fragments = read_json(job.run.path("score.json"))[name], []
    by_fold = part.get("by_fold")
    if by_fold and by_fold["folds"] > 1 and by_fold["mean"] is not None:
        mean = f"the mean AUROC is {by_fold['mean']:.4f}"
        fragments.append(f"Ranked within each of the {by_fold['folds']} folds separately, {mean}.")
    if part.get("epoch_chosen_on_these"):
        fragments.append(page.note("The epoch was chosen on these images, which inflates these scores.", "warning"))
    rows = classes[["label", "auroc", "low", "high"]].itertuples(index=False)
    fragments += [
        page.figure(plots.score_with_interval(rows, "AUROC", 0.5), "AUROC with intervals by patient"),
        page.figure(
            class_plots.roc_panels(truth, _predictions(job, name, table), LABELS), "ROC curves with their areas"
        ),
        page.details("Table, with DeLong's intervals", page.table(classes)),
    ]
    if name == "test":
        published = page.table(published_means())
        fragments.append(page.details("Published results on the whole official test list", published))
    return page.section(title, *fragments)


def _view_means(job, name):
    """Return the mean AUROC of each view's networks and, last, of both together."""
    truth, _, table = labelled_predictions(job.run, job.images, name)
    probs = _predictions(job, name, table) if len(table) else {}
    return {view: mean_of_defined(auroc(truth, p, np.nan)) for view, p in probs.items()}


def _views(job):
    if job.config.views != "both":
        return None
    means = {"out of fold": _view_means(job, "oof"), job.images.about["test_name"]: _view_means(job, "test")}
    frame = pd.DataFrame({name: part for name, part in means.items() if part}).rename_axis("view").reset_index()
    text = "Mean AUROC of each view's networks alone and of both; the tool `table` adds intervals and tests."
    return page.section("Views", text, page.table(frame))


def _operating_points(job):
    truth, probs, table = labelled_predictions(job.run, job.images, "oof")
    patients, folds = job.images.patients(job.images.rows_of(table["image_id"])), len(job.config.folds)
    text = (
        f"They hold for the probabilities of single networks. Test images get the mean of {folds} networks, which "
        "varies less, so the same thresholds may give other rates there."
    )
    drawn = results.classes(truth, probs, table["fold"].to_numpy(), LABELS, patients=patients)
    return page.section("Operating points and calibration", *[text] * (folds > 1), *drawn)


def _pictures(job):
    """Return the sections of the worst errors and of further pictures."""
    found, where = labelled_predictions(job.run, job.images, "test"), job.images.about["test_name"]
    if not len(found[2]):
        found, where = labelled_predictions(job.run, job.images, "oof"), "out of fold"
    right, wrong = confident_galleries(job.images, *found)
    text = f"Each label's most confident {{}} prediction {where}, with boxes where NIH drew them."
    truth, probs, table = found
    errors = np.abs(truth - probs)
    at, worst = np.arange(len(table)), errors.argmax(1)
    listed = table[["image_id"]].assign(label=np.take(LABELS, worst), present=truth[at, worst].astype(int))
    listed = listed.assign(probability=probs[at, worst]).iloc[np.argsort(-errors[at, worst], kind="stable")]
    further = page.section("Pictures", text.format("right"), right, map_gallery(job, *found))
    return [results.worst_errors(listed, text.format("wrong"), wrong), further]


def submission(job, record):
    """Return the distribution of the probabilities."""
    table = read_csv(job.run.path("submission.csv"))
    groups = {label: table[label] for label in LABELS[:4]}
    return [page.figure(plots.histogram(groups, "probability"), "Probabilities of four of the labels")]
