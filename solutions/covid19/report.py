"""COVID-19's sections of the report: first whether the score can be trusted, then the results in detail."""

import numpy as np
import pandas as pd

from common.paths import read_array, read_csv, read_json, read_parquet
from common.report import class_plots, page, plots, results
from common.report.frame import step_section
from common.report.gallery import augmented_gallery, gallery
from solutions.covid19.audit import PREFIX, focus_networks, read_audit, view_of
from solutions.covid19.config import COVID, LABELS, PREDICTIVE, PRINTED
from solutions.covid19.data import read_selection, reason_kinds, rejected_shares
from solutions.covid19.lungs import MASKS
from solutions.covid19.models import covid_network
from solutions.covid19.pictures import SEEN, heat_strips, lung_strips, pick_answers, view_strips
from solutions.covid19.scoring import HALF, RATES, auroc_interval, published, with_truth

TITLE = COVID
EXPERIMENTS = (PREFIX,)
SHORT = {"origin": "distinguishes collections", "view": "distinguishes AP from PA"}  # names of networks
DOUBTFUL = 0.9  # probability of the other view
WORST = 8  # pictures of errors
AUGMENTED = 2  # images of each label whose augmentation is shown
WITHOUT = LABELS[0]


def fold_scores(job):
    """Return the AUROC of each fold, see common.report.results.scores_by_fold."""
    oof = with_truth(job.images, read_parquet(job.run.path("oof.parquet")))
    oof = oof[oof["role"] == "main"].reset_index(drop=True)

    def score(chosen, groups):
        return auroc_interval(oof["label"][chosen], oof["probability"][chosen], groups)

    return results.scores_by_fold(oof["fold"], oof["patient_id"], score)


def hints(job, score, trainings):
    """Return hints about the origin of the images, see common.report.hints."""
    texts, same = [], score["same_source"]
    if job.config.view != "lungs":
        texts.append("The network sees the margins, which give the collection away: `--view lungs` hides them.")
    if same and same["fall"]["low"] is not None and same["fall"]["low"] > 0 and not same["trained_on"]:
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
    """Return audit, folds and predictions if current, then data and lungs."""
    parts = []
    if job.is_current("tune"):
        score = read_json(job.run.path("score.json"))
        oof = with_truth(job.images, read_parquet(job.run.path("oof.parquet")))
        audit = step_section(job, "audit", "Audit", lambda job: _audit(job, score, oof))
        parts = [audit, _folds(job.run, score), _predictions(oof), _worst(job, oof)]
    selection = read_selection(job.run)
    return [*parts, _data(job.images, selection), _lungs(job, selection), _augmentation(job)]


def _audit(job, score, oof):
    """Return the results of `audit`; score: score.json; oof: out-of-fold predictions with true labels."""
    found, predictions, focus = read_audit(job.run)
    config, checks, views = job.config, found["checks"], found["focus"]
    names = {check: SHORT.get(check) or SEEN[view_of(config, check)] for check in checks}
    lines = [(f"this run: {SEEN[config.view]}", score["auroc"])]
    if score["same_source"]:
        lines.append(("this run, same collections", score["same_source"]["auroc"]))
    lines += [(names[check], part["auroc"]) for check, part in checks.items() if part["auroc"]]
    asked = [
        (names[check], part["said"], part.get("images"), part.get("epochs"), _text(part["auroc"]), part.get("accuracy"))
        for check, part in checks.items()
    ]
    asked = pd.DataFrame(asked, columns=["network", "question", "images", "epochs", "AUROC", "accuracy"])
    asked = asked.astype({"images": "Int64", "epochs": "Int64"})
    looks = [
        (SEEN[view], _text(part["share"]), part["area"], part["images"], part["flat"]) for view, part in views.items()
    ]
    looks = pd.DataFrame(looks, columns=["network sees", "in the lungs", "chance", "images", "empty maps"])
    groups = {SEEN[view]: 100 * focus.loc[focus["view"] == view, "share"] for view in views}
    groups["chance"] = 100 * focus.drop_duplicates("image_id")["area"]
    answers = pick_answers(oof[oof["fold"].isin(found["folds"]) & (oof["role"] == "main")])
    panels = ", ".join(["the radiograph with its lungs", *(f"the network that sees {SEEN[view]}" for view in views)])
    high = config.audit.high
    return [
        f"Trained with the folds {', '.join(map(str, found['folds']))} held out in turn; the network on "
        f"{names.get('image', SEEN['image'])} like those of the run ({config.network.epochs} epochs).",
        page.figure(
            plots.score_with_interval([(name, *interval.values()) for name, interval in lines], "AUROC", high),
            f"Margin, background and origin count against the run if their interval lies above {high:g}, the dashed "
            "line; the same collections, if the AUROC drops by an interval that excludes 0",
        ),
        page.table(asked, "What each network of the audit had to predict"),
        *[_doubtful_views(job, predictions[predictions["check"] == "view"])] * ("view" in checks),
        f"What the views show: {', '.join(SEEN.values())}.",
        view_strips(job.images, answers, config.audit.margin),
        page.table(looks, "Mean share of a heat map in the lungs; chance: the lungs' share of the image"),
        page.figure(
            plots.histogram(groups, "share of the heat map in the lungs, %", 25),
            "Share of each heat map in the lungs, and the lungs' share of the image",
        ),
        f"Grad-CAM, violet to yellow from the least to the strongest evidence for the answer, which is {COVID} from a "
        f"probability of {HALF} and {WITHOUT} below: {panels}.",
        heat_strips(job, answers, {fold: focus_networks(config, fold) for fold in found["folds"]}),
    ]


def _text(interval):
    return page.interval_text(*interval.values()) if interval else None


def _doubtful_views(job, answers):
    """Return the images whose look contradicts the view in their table; answers: those of the check "view"."""
    table = answers.merge(read_selection(job.run)[["image_id", "collection", "view_said"]], on="image_id")
    table = table[(table["probability"] - table["label"]).abs() > DOUBTFUL].rename(columns={"probability": "P(AP)"})
    caption = f"Images whose look contradicts the view in their table, with a probability over {DOUBTFUL}: {len(table)}"
    return page.details(caption, page.table(table[["image_id", "collection", "view_said", "P(AP)"]], limit=20))


def _data(images, selection):
    used, n_tests = images.table[images.table["fold"] >= 0], (images.table["split"] == "test").sum()
    main, n_same = used[used["role"] == "main"], (used["role"] == "same_source").sum()
    text = (
        f"{len(selection):,} rows in the tables; {len(main):,} images of {main['patient_id'].nunique():,} patients for "
        f"training and scoring; {n_same:,} of the {COVID} images' own collections for scoring only; {n_tests:,} to "
        "predict."
    )
    folds = used.groupby(["fold", "role", "label"]).size().unstack(["role", "label"], fill_value=0)
    folds.columns = ["only scored" if role == "same_source" else LABELS[label] for role, label in folds]
    folds = folds[[name for name in (COVID, WITHOUT, "only scored") if name in folds]].reset_index()
    folds.insert(1, "patients", used.groupby("fold")["patient_id"].nunique().to_numpy())
    home = selection["collection"].isin(selection.loc[selection["label"] == 1, "collection"])
    findings = selection.loc[home, "finding"].replace("", "not given").value_counts().reset_index(name="rows")
    return page.section(
        "Data",
        text,
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
    reasons, rows, collections = reason_kinds(selection["reason"]), [], selection["collection"].unique().tolist()
    kinds = dict(list(selection.groupby(["collection", "label"])))
    for collection, label in sorted(kinds, key=lambda kind: (collections.index(kind[0]), -kind[1])):
        kept = kinds[collection, label]["kept"]
        why = reasons[kept.index[~kept]].value_counts()
        counts = {"rows": len(kept), "used": kept.sum(), "left out": why.sum()}
        text = ", ".join(f"{n:,} {reason}" for reason, n in why.items())
        rows.append({"collection": collection, "label": LABELS[label], **counts, "because of": text})
    return pd.DataFrame(rows)


def _by_label(table, column):
    return {name: table.loc[table["label"] == label, column] for label, name in LABELS.items()}


def _lungs(job, selection):
    config, shares = job.config, rejected_shares(selection)
    rejected = [
        {"images": name, "total": n, "rejected": round(share * n), "share": share}
        for name, (share, n) in shares.items()
    ]
    table = job.images.table
    areas = {name: 100 * values for name, values in _by_label(table[table["ok"]], "area").items()}
    drawn = plots.histogram(areas, "lungs, % of the image", threshold=100 * config.lungs.gate)
    view = "only the lungs" if config.view == "lungs" else "the whole image"
    return page.section(
        "Lungs",
        f"This run's networks see {view}. The dashed line is the gate: images with less lung are left out.",
        page.grid(
            page.table(pd.DataFrame(rejected), "Images checked by the gate"),
            page.figure(drawn, "Area of the lungs, after dilation"),
        ),
        *lung_strips(job.images, selection),
    )


def _folds(run, score):
    folds = read_csv(run.path("per_fold.csv"), dtype={"rule": str})
    half = folds[folds["rule"] == str(HALF)].reset_index(drop=True)
    tuned = folds[folds["rule"] != str(HALF)].reset_index(drop=True)
    for part in (half, tuned):
        part.insert(len(part.columns), PREDICTIVE, part["tn"] / (part["tn"] + part["fn"]))
    ours = pd.DataFrame([{"network": "this run", **half[[*RATES, PREDICTIVE]].mean()}])
    estimates = {
        name: [*half[[name, f"{name}_low", f"{name}_high"]].to_numpy(), list(score[name].values())] for name in RATES
    }
    drawn = plots.forest(estimates, [*(f"fold {fold}" for fold in half["fold"]), "all images"], "share")
    return page.section(
        "Rates by fold",
        page.table(_fold_rows(half, score), f"At a probability of {HALF}"),
        page.details(
            "At thresholds by Youden's index, chosen for each fold on the others",
            page.table(_fold_rows(tuned, score["tuned"])),
        ),
        page.figure(drawn, "Folds with Wilson intervals, which treat images as independent; all images by patient"),
        page.table(pd.concat([ours, published()]), "Means over folds, and the paper's on its own images"),
        PRINTED,
    )


def _fold_rows(part, pooled):
    """Return the table of one rule: each fold with intervals, the mean over folds, and all images together."""
    counts = ["images", "tp", "fn", "tn", "fp"]
    table = part[["fold", *counts]].astype(object)
    mean, total = {"fold": "mean ± sd"}, {"fold": "all images", **part[counts].sum()}
    for name in RATES:
        table[name] = [page.interval_text(*row) for row in part[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)]
        mean[name] = f"{part[name].mean():.4f} ± {part[name].std():.4f}"
        total[name] = _text(pooled[name])
    table[PREDICTIVE] = part[PREDICTIVE].astype(object)
    mean[PREDICTIVE] = f"{part[PREDICTIVE].mean():.4f} ± {page.as_text(part[PREDICTIVE].std())}"
    total[PREDICTIVE] = total["tn"] / max(total["tn"] + total["fn"], 1)
    table = pd.concat([table, pd.DataFrame([mean, total], dtype=object)], ignore_index=True)
    return table.astype(dict.fromkeys(counts, "Int64"))


def _predictions(oof):
    main = oof[oof["role"] == "main"]
    columns = (main[[name]].to_numpy() for name in ("label", "probability"))
    outcomes = (WITHOUT, COVID)
    drawn = results.classes(*columns, main["fold"], [COVID], HALF, outcomes, main["patient_id"].to_numpy())
    figures, home = [], oof[oof["home"]]
    if (home["label"] == 0).any():
        roc = class_plots.roc_panels(home[["label"]].to_numpy(), {"": home[["probability"]].to_numpy()}, [COVID])
        figures.append(page.figure(roc, "ROC curve of the images of the same collections"))
    for k, part in oof.groupby("label", sort=False):
        groups = {name: images["probability"] for name, images in part.groupby("collection")}
        if len(groups) > 1:
            by_collection = plots.histogram(groups, "probability", threshold=HALF)
            figures.append(page.figure(by_collection, f"{LABELS[k]}: probabilities by collection"))
    oof = oof.assign(correct=(oof["probability"] >= HALF) == (oof["label"] == 1))
    columns = {"images": ("label", "size"), "patients": ("patient_id", "nunique"), "correct": ("correct", "mean")}
    columns["mean probability"] = ("probability", "mean")
    table = oof.groupby(["collection", "label"]).agg(**columns).reset_index()
    table["label"] = table["label"].map(LABELS)
    return page.section("Out of fold", *drawn, page.grid(*figures), page.table(table, f"By collection, at {HALF}"))


def _worst(job, oof):
    error = (oof["label"] - oof["probability"]).abs()
    listed = oof.assign(row=job.images.rows_of(oof["image_id"])).iloc[np.argsort(-error.to_numpy(), kind="stable")]
    pixels, masks = job.images.store.images, read_array(job.images.arrays[MASKS])
    items = [
        (
            pixels[one.row],
            None,
            masks[one.row],
            f"{LABELS[one.label]}, probability {one.probability:.3f} · {one.image_id}",
        )
        for one in listed.head(WORST).itertuples()
        if (one.probability >= HALF) != one.label
    ]
    names = ["image_id", "fold", "collection", "role", "label", "probability"]
    text = f"The wrong answers, at a probability of {HALF}, with the highest confidence."
    return results.worst_errors(listed[names].replace({"label": LABELS}), text, gallery(items, names=("", "lungs")))


def submission(job, record):
    """Return the distribution of the probabilities, and the number of images with the mean probability."""
    probs = {"test images": read_parquet(job.run.path("test.parquet"))["probability"]}
    figure = page.figure(plots.histogram(probs, "probability"), "Probabilities of the test images")
    n_neutral = record["rows"] - len(probs["test images"])
    return [*[f"{n_neutral:,} images without usable lungs get the mean probability."] * (n_neutral > 0), figure]
