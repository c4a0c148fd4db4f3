"""The page of a run: what was found so far, and how good it is."""

import numpy as np
import pandas as pd

from common.metrics.classification import auroc, mean_of_defined
from common.paths import read_csv, read_json, read_parquet
from common.report import class_plots, page, plots, sections
from solutions.chestxray14 import pictures
from solutions.chestxray14.config import LABELS, PUBLISHED
from solutions.chestxray14.pictures import scored


def write_report(context, data, tuned, localised):
    """Write report.html of the run from whatever is there; parts that are missing are left out or said to be.

    tuned, localised: whether the figures and the maps in the run are those of its present networks and settings.
    """
    run = context.run
    parts = [_headline(context, data, tuned), _data(data), _lungs(data), *sections.training(context)]
    if tuned:
        parts += [
            _classes(context, data, "oof", "Out of fold"),
            _classes(context, data, "test", f"Scores {data.test_name}"),
            _views(context, data),
            _operating(context, data),
            _pictures(context, data),
        ]
    if localised:
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
            cards.append(
                (
                    f"Mean AUROC {said}",
                    mean["estimate"],
                    f"95 % interval {mean['low']:.4f}–{mean['high']:.4f}, {part['images']:,} images of "
                    f"{part['patients']:,} patients, {part['classes']} classes",
                )
            )
    notes.append(page.note(data.official["said"]))
    return page.join(page.cards(cards), *notes)


def _data(data):
    table = data.table
    train, test = table[table["split"] == "train"], table[table["split"] == "test"]
    known = test[(test[list(LABELS)] >= 0).all(axis=1)]
    boxes = np.bincount(data.boxes["label"], minlength=len(LABELS)) if len(data.boxes) else np.zeros(len(LABELS), int)
    counts = pd.DataFrame(
        {
            "label": LABELS,
            "train": train[list(LABELS)].sum().to_numpy(),
            "test": known[list(LABELS)].sum().to_numpy(),
            "boxes": boxes,
        }
    )
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
    return page.section("Lungs", page.grid(*fragments), *pictures.lungs(data))


def _answers(context, data, name, table):
    """The run's answers about the images of `table` by what they are of: with two views those of each view too."""
    config, found = context.config, {}
    if config.views == "both":
        for stage in config.stages:
            part = read_parquet(context.run.path(f"{name}_{stage}.parquet")).set_index("image_id")
            found[stage] = part.loc[table["image_id"], list(LABELS)].to_numpy()
    how = {"fusion": "fused", "mean": "mean of both"}[config.combine]
    return found | {how if found else "run": table[list(LABELS)].to_numpy()}


def _classes(context, data, name, title):
    run = context.run
    classes = read_csv(run.path("classes.csv"), ["split", "label", "auroc"])
    classes = classes[classes["split"] == name].drop(columns="split")
    if not len(classes):
        return None
    truth, _, table = scored(run, data, name)
    rows = list(classes[["label", "auroc", "low", "high"]].itertuples(index=False, name=None))
    four = dict.fromkeys(("auroc", "low", "high", "delong_low", "delong_high"), ".4f")
    curves = class_plots.roc_panels(truth, _answers(context, data, name, table), LABELS)
    fragments = [
        page.figure(plots.score_with_interval(rows, "AUROC", 0.5), "With intervals by patient"),
        page.figure(curves, "ROC curves, with the area under each"),
        page.details("Table, with DeLong's intervals too", page.table(classes, "", four)),
    ]
    part = read_json(run.path("score.json"))[name]
    if part.get("epoch_chosen_on_these"):
        fragments.insert(0, page.note("The epoch was chosen on these images, so these scores flatter."))
    within = part.get("by_fold")
    if within and within["folds"] > 1 and within["mean"] is not None:
        fragments.insert(0, f"Ranked within each of the {within['folds']} folds: {within['mean']:.4f} in the mean.")
    if name == "test":
        known = pd.DataFrame(PUBLISHED.items(), columns=["published", "mean AUROC"])
        fragments.append(
            page.details(
                "What papers report on the whole official test list", page.table(known, "", {"mean AUROC": ".4f"})
            )
        )
    return page.section(title, *fragments)


def _views(context, data):
    """Mean AUROC of each view alone and of both; None for runs of one view."""
    if context.config.views != "both":
        return None
    found = {}
    for name, said in (("oof", "out of fold"), ("test", data.test_name)):
        truth, _, table = scored(context.run, data, name)
        if len(table):
            answers = _answers(context, data, name, table)
            found[said] = {of: mean_of_defined(auroc(truth, probs, np.nan)) for of, probs in answers.items()}
    frame = pd.DataFrame(found).rename_axis("view").reset_index()
    text = "Mean AUROC of either view's networks alone and of both; the verb `table` gives intervals and tests."
    return page.section("Views", text, page.table(frame, "", dict.fromkeys(found, ".4f")))


def _operating(context, data):
    points = read_csv(context.run.path("operating_points.csv"), ["label"])
    truth, probs, _ = scored(context.run, data, "oof")
    three = dict.fromkeys(points.columns.drop("label"), ".3f")
    positive, values, folds = truth.ravel() > 0, probs.ravel(), len(context.config.folds)
    groups = {"without": values[~positive], "with": values[positive]}
    text = "Thresholds by Youden's index; sensitivity and specificity of each fold at the threshold of the others."
    if folds > 1:
        text += (
            f" They are of single networks' probabilities out of fold; test images get the mean over {folds} folds, "
            "which spreads less, so that the same thresholds need not give the same rates there."
        )
    reliability = class_plots.reliability_panels(truth, probs, LABELS)
    return page.section(
        "Operating points and calibration",
        text,
        page.table(points, "Of each label", three),
        page.figure(reliability, "Reliability, with the expected calibration error"),
        page.figure(plots.histogram(groups, "probability"), "Probabilities with and without the label"),
    )


def _pictures(context, data):
    truth, probs, table, said = pictures.shown_answers(context.run, data)
    return page.section(
        "Pictures",
        f"The surest right answer of each label and the surest wrong one, {said}; boxes where NIH drew them.",
        *pictures.surest(data, truth, probs, table),
        pictures.overlays(context, data, truth, probs, table),
    )


def _submission(run):
    step = run.step("submit")
    text = f"{step['rows']:,} rows. Validated."
    if step["hidden"]:
        text += f" Mean AUROC on the sample's test list {step['hidden']['value']:.4f}."
    table = read_csv(run.path("submission.csv"))
    groups = {label: table[label].to_numpy() for label in LABELS[:4]}
    return page.section("Submission", text, page.figure(plots.histogram(groups, "probability"), "Four of the labels"))
