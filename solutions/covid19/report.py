"""COVID-19's sections of the report: first whether the score can be trusted, then the results in detail."""

import numpy as np
import pandas as pd
import torch

from common.config import digest
from common.data.dicom import read_image
from common.kaggle.session import display_gallery
from common.paths import read_array, read_csv, read_json, read_parquet, walk_files
from common.report import class_plots, page, plots, results
from common.report.frame import step_section
from common.report.gallery import augmented_gallery, cached_arrays, gallery, heat_overlay
from common.step import cached_hash
from common.submit.table import read_table
from solutions.covid19.audit import PREFIX, focus_networks, read_audit, view_of
from solutions.covid19.comparison import HALF, RATES, published, with_truth
from solutions.covid19.config import COVID, LABELS, PREDICTIVE, PRINTED
from solutions.covid19.data import GATED, MASKS, read_selection, reason_kinds, rejected_shares
from solutions.covid19.models import apply_view, covid_network, heat_maps

TITLE = COVID
EXPERIMENTS = (PREFIX,)
SHORT = {"origin": "distinguishes collections", "view": "distinguishes AP from PA"}  # short names of networks
DOUBTFUL = 0.9  # minimum probability of the other view
WORST = 8  # number of pictures of errors
AUGMENTED = 2  # images of each label whose augmentation is shown
WITHOUT = LABELS[0]
SIDE = 240  # pixels of a small picture
PER_KIND = 2  # images of each kind
MOST_REJECTED = 6
SEEN = {"image": "the whole image", "lungs": "the lungs", "border": "the margin", "background": "all but the lungs"}


def hints(job, score, trainings):
    """Return hints about the images' origin (see common.report.hints)."""
    texts, same = [], score["same_source"]
    if job.config.view != "lungs":
        texts.append("The network sees the margins, which give the collection away: `--view lungs` hides them.")
    if same and (same["fall"]["low"] or 0) > 0 and not same["trained_on"]:
        texts.append(
            f"Against images of the same collections the AUROC is {same['auroc']['estimate']:.2f}, by "
            f"{same['fall']['estimate']:.2f} lower: `--same-source train` makes them negatives."
        )
    return texts


def headline(job, score):
    """Return the audit's verdict and the scores as cards."""
    command = f"cxr covid19 audit --out {job.run.folder}"
    verdict = page.note(f"How much of the score reflects the images' origin has not been audited yet: {command}")
    if job.is_current("audit"):
        audit = read_audit(job.run)[0]
        verdict = page.note(audit["said"], "warning" if audit["biased"] else "info")
    size = f"{score['images']:,} images of {score['patients']:,} patients"
    cards = [("AUROC out of fold", score["auroc"]["estimate"], f"{page.range_text(score['auroc'])}; {size}")]
    if same := score["same_source"]:
        trained = "also used for training" if same["trained_on"] else "never trained on"
        size = f"{same['positives']:,} against {same['negatives']:,} images, the latter {trained}"
        hint, value = f"{page.range_text(same['auroc'])}; {size}", same["auroc"]["estimate"]
    else:
        hint, value = f"unknown: the collections with {COVID} have no images without it", None
    cards.append(("AUROC, same collections", value, hint))
    cards += [(n.capitalize(), score[n]["estimate"], f"{page.range_text(score[n])}, at {HALF}") for n in RATES]
    return [verdict, page.cards(cards)]


def sections(job):
    """Return the sections: audit, folds and predictions if they are current, then data and lungs."""
    parts = []
    if job.is_current("tune"):
        score = read_json(job.run.path("score.json"))
        oof = with_truth(job.images, read_parquet(job.run.path("oof.parquet")))
        audit = step_section(job, "audit", "Audit", lambda job: _audit(job, score, oof))
        parts = [audit, _folds(job.run, score), _predictions(oof), _worst(job, oof)]
    selection = read_selection(job.run)
    return [*parts, _data(job.images, selection), _lungs(job, selection), _augmentation(job)]


def _audit(job, score, oof):
    """Return the section on `audit`; score: score.json; oof: out-of-fold predictions with true labels."""
    found, predictions, focus = read_audit(job.run)
    config, checks, views, high = job.config, found["checks"], found["focus"], job.config.audit.high
    names = {check: SHORT.get(check) or SEEN[view_of(config, check)] for check in checks}
    aurocs = {f"this run: {SEEN[config.view]}": score["auroc"]}
    aurocs |= {"this run, same collections": score["same_source"]["auroc"]} if score["same_source"] else {}
    aurocs |= {names[check]: part["auroc"] for check, part in checks.items() if part["auroc"]}
    lines = [(name, *interval.values()) for name, interval in aurocs.items()]
    asked = [
        (names[check], part["said"], part.get("images"), part.get("epochs"), _text(part["auroc"]), part.get("accuracy"))
        for check, part in checks.items()
    ]
    asked = pd.DataFrame(asked, columns=["network", "question", "images", "epochs", "AUROC", "accuracy"])
    asked = asked.astype({"images": "Int64", "epochs": "Int64"})
    looks = [(SEEN[view], _text(v["share"]), v["area"], v["images"], v["flat"]) for view, v in views.items()]
    looks = pd.DataFrame(looks, columns=["network sees", "in the lungs", "chance", "images", "empty maps"])
    groups = {SEEN[view]: 100 * focus.loc[focus["view"] == view, "share"] for view in views}
    groups["chance"] = 100 * focus.drop_duplicates("image_id")["area"]
    shares = plots.histogram(groups, "share of the heat map in the lungs, %", 25)
    answers = pick_answers(oof[oof["fold"].isin(found["folds"]) & (oof["role"] == "main")])
    return [
        f"Trained with the folds {', '.join(map(str, found['folds']))} held out in turn; the network on "
        f"{names.get('image', SEEN['image'])} like those of the run ({config.network.epochs} epochs).",
        page.figure(
            plots.score_with_interval(lines, "AUROC", high),
            f"Margin, background and origin count against the run if their interval lies above {high:g}, the dashed "
            "line; the same collections, if the AUROC drops by an interval that excludes 0",
        ),
        page.table(asked, "What each network of the audit had to predict"),
        *[_doubtful_views(job, predictions[predictions["check"] == "view"])] * ("view" in checks),
        _view_pictures(job.images, answers, config.audit.margin),
        page.table(looks, "Mean share of a heat map in the lungs; chance: the lungs' share of the image"),
        page.figure(shares, "Share of each heat map in the lungs, and the lungs' share of the image"),
        f"Grad-CAM, violet to yellow from the least to the strongest evidence for the answer, which is {COVID} from a "
        f"probability of {HALF} and {WITHOUT} below.",
        _heat_pictures(job, answers, {fold: focus_networks(config, fold) for fold in found["folds"]}),
    ]


def _text(interval):
    return page.interval_text(*interval.values()) if interval else None


def _doubtful_views(job, answers):
    """Return the images whose predicted view contradicts their table; answers: those of the check "view"."""
    table = answers.merge(read_selection(job.run)[["image_id", "collection", "view_said"]], on="image_id")
    table = table[(table["probability"] - table["label"]).abs() > DOUBTFUL].rename(columns={"probability": "P(AP)"})
    caption = f"Images whose look contradicts the view in their table, with a probability over {DOUBTFUL}: {len(table)}"
    return page.details(caption, page.table(table[["image_id", "collection", "view_said", "P(AP)"]], limit=20))


def _data(images, selection):
    used, n_tests = images.table[images.table["fold"] >= 0], (images.table["split"] == "test").sum()
    main, n_same = used[used["role"] == "main"], (used["role"] == "same_source").sum()
    folds = used.groupby(["fold", "role", "label"]).size().unstack(["role", "label"], fill_value=0)
    folds.columns = ["only scored" if role == "same_source" else LABELS[label] for role, label in folds]
    folds = folds[[name for name in (COVID, WITHOUT, "only scored") if name in folds]].reset_index()
    folds.insert(1, "patients", used.groupby("fold")["patient_id"].nunique().to_numpy())
    home = selection["collection"].isin(selection.loc[selection["label"] == 1, "collection"])
    findings = selection.loc[home, "finding"].replace("", "not given").value_counts().reset_index(name="rows")
    return page.section(
        "Data",
        f"{len(selection):,} rows in the tables; {len(main):,} images of {main['patient_id'].nunique():,} patients for "
        f"training and scoring; {n_same:,} of the {COVID} images' own collections for scoring only; {n_tests:,} to "
        "predict.",
        page.table(count_reasons(selection), "Rows of the tables, and why rows are not used"),
        page.table(folds, "Folds, by patient"),
        page.grid(
            page.figure(plots.histogram(_by_label(used, "age"), "age, years", 20), "Ages, where known"),
            page.table(findings, f"Findings of all rows in the collections with {COVID}", limit=20),
        ),
    )


def _augmentation(job):
    """Return training images under several draws of the network's augmentation."""
    config, images = job.config, job.images
    if config.network.augmentation == "none":
        return None
    rows = np.concatenate([images.rows(role="main", label=label)[:AUGMENTED] for label in (1, 0)])
    captions = [f"{LABELS[row.label]} · {row.image_id}" for row in images.at(rows).itertuples()]
    data = covid_network(config, config.folds[0]).dataset(job, rows, True, False)
    text = f"Training images as the network sees them, plain and augmented ({config.network.augmentation})."
    return page.section("Augmentation", text, augmented_gallery(data, captions))


def count_reasons(selection):
    """Return the number of used and unused rows, with reasons, by collection and label.

    selection: the table of `data.read_selection`. Reasons that differ only in a number or a name count as one.
    """
    rows = []
    selection = selection.assign(kind=reason_kinds(selection["reason"]))
    for (collection, label), part in selection.groupby(["collection", "label"], sort=False):
        why = part.loc[~part["kept"], "kind"].value_counts()
        counts = {"rows": len(part), "used": part["kept"].sum(), "left out": why.sum()}
        text = ", ".join(f"{n:,} {reason}" for reason, n in why.items())
        rows.append({"collection": collection, "label": LABELS[label], **counts, "because of": text})
    return pd.DataFrame(rows)


def _by_label(table, column):
    return {name: table.loc[table["label"] == label, column] for label, name in LABELS.items()}


def _lungs(job, selection):
    config, table = job.config, job.images.table
    rejected = [(name, n, round(share * n), share) for name, (share, n) in rejected_shares(selection).items()]
    rejected = pd.DataFrame(rejected, columns=["images", "total", "rejected", "share"])
    areas = {name: 100 * values for name, values in _by_label(table[table["ok"]], "area").items()}
    drawn = plots.histogram(areas, "lungs, % of the image", threshold=100 * config.lungs.gate)
    drawn = page.figure(drawn, "Area of the lungs, after dilation")
    view = "only the lungs" if config.view == "lungs" else "the whole image"
    return page.section(
        "Lungs",
        f"This run's networks see {view}. The dashed line is the gate: images with less lung are left out.",
        page.grid(page.table(rejected, "Images checked by the gate"), drawn),
        *_lung_pictures(job.images, selection),
    )


def _folds(run, score):
    """Return each fold's rates at 0.5, their mean and spread, the rates over all images, and the paper's."""
    folds, counts, rates = read_csv(run.path("per_fold.csv")), ["images", "tp", "fn", "tn", "fp"], [*RATES, PREDICTIVE]
    folds[PREDICTIVE] = folds["tn"] / (folds["tn"] + folds["fn"])
    pooled = {name: score[name]["estimate"] for name in RATES}
    pooled[PREDICTIVE] = folds["tn"].sum() / max((folds["tn"] + folds["fn"]).sum(), 1)
    ours = pd.DataFrame([*folds[rates].agg(["mean", "std"]).to_dict("records"), pooled])
    ours.insert(0, "network", ["this run, mean of folds", "this run, sd over folds", "this run, all images"])
    tuned = ", ".join(f"{name} {_text(score['tuned'][name])}" for name in RATES)
    of_folds = {name: folds[[name, f"{name}_low", f"{name}_high"]].to_numpy() for name in RATES}
    estimates = {name: [*rows, list(score[name].values())] for name, rows in of_folds.items()}
    drawn = plots.forest(estimates, [*(f"fold {fold}" for fold in folds["fold"]), "all images"], "share")
    return page.section(
        "Rates by fold",
        page.table(folds[["fold", *counts, *rates]], f"At a probability of {HALF}"),
        page.figure(drawn, "Folds with Wilson intervals, which treat images as independent; all images by patient"),
        page.table(pd.concat([ours, published()]), "Means over folds, and the paper's on its own images"),
        PRINTED,
        f"At thresholds by Youden's index, chosen for each fold on the others, all images: {tuned}.",
    )


def _predictions(oof):
    main, home, figures = oof[oof["role"] == "main"], oof[oof["home"]], []
    drawn = results.one_class(main, "label", "probability", (WITHOUT, COVID), HALF, main["patient_id"].to_numpy())
    if (home["label"] == 0).any():
        roc = class_plots.roc_panels(home[["label"]].to_numpy(), {"": home[["probability"]].to_numpy()}, [COVID])
        figures.append(page.figure(roc, "ROC curve of the images of the same collections"))
    oof = oof.assign(correct=(oof["probability"] >= HALF) == (oof["label"] == 1))
    shown = {"images": ("label", "size"), "patients": ("patient_id", "nunique"), "correct": ("correct", "mean")}
    table = oof.groupby(["collection", "label"], as_index=False).agg(**shown)
    table["label"] = table["label"].map(LABELS)
    return page.section("Out of fold", *drawn, *figures, page.table(table, f"By collection, at {HALF}"))


def _worst(job, oof):
    listed = oof.iloc[np.argsort(-(oof["label"] - oof["probability"]).abs().to_numpy(), kind="stable")]
    pixels, masks, items = job.images.store.images, read_array(job.images.arrays[MASKS]), []
    for one in listed.head(WORST).itertuples():
        if (one.probability >= HALF) != one.label:
            caption = f"{LABELS[one.label]}, probability {one.probability:.3f} · {one.image_id}"
            items.append((pixels[one.row], None, masks[one.row], caption))
    names = ["image_id", "fold", "collection", "role", "label", "probability"]
    text = f"The wrong answers, at a probability of {HALF}, with the highest confidence."
    return results.worst_errors(listed[names].replace({"label": LABELS}), text, gallery(items, names=("", "lungs")))


# ---- pictures ------------------------------------------------------------------------------------------------------


def _lung_pictures(images, selection):
    """Return galleries of outlined and cut-out lungs: a few images per collection and label, and rejected ones."""
    masks, pixels = read_array(images.arrays[MASKS]), images.store.images

    def drawn(title, rows, names):
        items = []
        for row, name in zip(rows, names, strict=True):
            cut_out = apply_view(pixels[row], masks[row], "lungs", None)
            items += [(pixels[row], None, masks[row], name), (cut_out, None, None, "its lungs")]
        return gallery(items, title, SIDE, names=("", "lungs"))

    used = images.table[images.table["fold"] >= 0].groupby(["collection", "label"])
    used = pd.concat([part.iloc[:: max(1, len(part) // PER_KIND)].head(PER_KIND) for _, part in used])
    names = used["collection"] + ", " + used["label"].map(LABELS) + " · " + used["image_id"]
    galleries = [drawn("Used", used["row"], names + ": " + used["area"].map("{:.1%} of the image".format))]
    gated = selection[selection["reason"].str.startswith(GATED)].head(MOST_REJECTED)
    if len(gated):
        reasons = gated["reason"].str.removeprefix(GATED)
        names = gated["label"].map(LABELS) + " · " + gated["image_id"] + ": " + reasons
        galleries.append(drawn("Rejected by the area gate", images.rows_of(gated["image_id"]), names))
    return galleries


def _view_pictures(images, answers, margin):
    """Return a gallery of the audit's views of one image of each label; answers: as in `pick_answers`."""
    masks, items = read_array(images.arrays[MASKS]), []
    for one in answers.drop_duplicates("label").itertuples():
        image = np.asarray(images.store.images[one.row])
        for view, text in SEEN.items():
            items.append((apply_view(image, masks[one.row], view, margin), None, None, f"{text} · {one.image_id}"))
    return gallery(items, size=SIDE)


def pick_answers(answers):
    """Return each label's most confident correct predictions, and its most confident wrong one, if any."""
    ordered = answers.sort_values("probability", ascending=False, kind="stable")
    positive, negative = ordered[ordered["label"] == 1], ordered[ordered["label"] == 0][::-1]
    places = [*positive.index[:PER_KIND], *negative.index[:PER_KIND]]
    places += positive.index[positive["probability"] < 0.5][-1:].tolist()
    places += negative.index[negative["probability"] >= 0.5][-1:].tolist()
    return answers.loc[list(dict.fromkeys(places))]


def _heat_pictures(job, answers, networks):
    """Return a gallery of each view with the heat map of its network."""
    images, maps, items = job.images, compute_heat_maps(job, answers, networks), []
    masks = read_array(images.arrays[MASKS])
    for k, one in enumerate(answers.itertuples()):
        image = np.asarray(images.store.images[one.row])
        for view, heats in maps.items():
            heat = heats[k] / max(heats[k].max(), np.float32(1e-12))
            caption = f"{LABELS[one.label]}, probability {one.probability:.3f} · {one.image_id}: {SEEN[view]}"
            picture = apply_view(image, masks[one.row], view, job.config.audit.margin), heat
            items.append((picture, None, None, caption))
    return gallery(items, size=SIDE, overlay=heat_overlay)


def compute_heat_maps(job, answers, networks):
    """Return each view's heat maps of the predicted label, float32 (n, h, w), computed on the CPU and cached."""
    answers = answers.reset_index(drop=True)
    signs = np.where(answers["probability"] >= HALF, 1, -1)
    used = [(fold, view, each) for fold in sorted(set(answers["fold"])) for view, each in networks[fold].items()]

    def compute():
        maps = {}
        for fold, view, network in used:
            for sign in sorted(set(signs[answers["fold"] == fold])):
                part, title = answers[(answers["fold"] == fold) & (signs == sign)], f"{view}, fold {fold}"
                heat = heat_maps(job, network, part["row"].to_numpy(), torch.device("cpu"), title, sign)
                maps.setdefault(view, np.zeros((len(answers), *heat.shape[1:]), np.float32))[part.index] = heat
        return maps

    hashes = [[fold, view, cached_hash(network.weights(job.run))] for fold, view, network in used]
    key = digest(job.images.pixels_key, answers["image_id"].tolist(), signs.tolist(), hashes)
    return cached_arrays(job.run.path("heats.npz"), key, compute)


def submission(job, record):
    """Return the distribution of the probabilities and the number of images that got the mean probability."""
    probs = {"test images": read_parquet(job.run.path("test.parquet"))["probability"]}
    figure = page.figure(plots.histogram(probs, "probability"), "Probabilities of the test images")
    n_neutral = record["rows"] - len(probs["test images"])
    return [*[f"{n_neutral:,} images without usable lungs get the mean probability."] * (n_neutral > 0), figure]


def show_predictions(submission, folder, count=4):
    """Show the images of `folder` with the highest and the lowest probabilities."""
    table = read_table(submission).astype({"probability": float})
    table = table.sort_values("probability", ascending=False, kind="stable")
    files = {path.name: path for path in walk_files(folder)}
    rows = pd.concat([table.head(count - count // 2), table.tail(count // 2)]).drop_duplicates()
    shown = [(read_image(files[row.filename]), f"{row.filename}: {row.probability:.2f}") for row in rows.itertuples()]
    display_gallery([(image, None, None, caption) for image, caption in shown])
