"""The page of a run: first whether its score can be believed, then the score and what it was made from."""

import numpy as np
import pandas as pd

from common.paths import read_parquet
from common.report import class_plots, page, plots, sections
from solutions.covid19 import pictures
from solutions.covid19.audit_section import audit_section, numbers, with_interval
from solutions.covid19.config import COVID, PUBLISHED
from solutions.covid19.data import read_selection, rejected_shares
from solutions.covid19.scoring import HALF, RATES, read_per_fold, read_score

WITHOUT = f"no {COVID}"
LABELS = {1: COVID, 0: WITHOUT, -1: "unknown"}


def write_report(context, data, tuned):
    """Write report.html of the run from whatever is there; parts that are missing are left out or said to be.

    tuned: whether the figures in the run are those of its present networks and settings.
    """
    from solutions.covid19.audit import read_audit  # it imports the pipeline, which imports this module
    from solutions.covid19.pipeline import scored

    run = context.run
    audit = read_audit(run) if tuned else None
    parts = [_verdict(context, audit), sections.synthetic(context), _headline(run, tuned)]
    if tuned:
        oof = scored(run, data)
        parts += [audit_section(context, data, oof, audit), _folds(run), _answers(oof)]
    parts += [_data(data, run), _lungs(context, data), *sections.training(context, aside="audit-")]
    if tuned and (run.step("submit") or {}).get("rows") and run.path("submission.csv").is_file():
        parts.append(_submission(run))
    parts.append(sections.about(run))
    title = f"{COVID}, preset {context.preset}"
    page.write_page(run.path("report.html"), title, f"run {run.folder.name}", [p for p in parts if p is not None])


def _verdict(context, audit):
    if audit is not None:
        return page.note(audit[0]["said"], "warning" if audit[0]["biased"] else "info")
    command = f"cxr covid19 audit --out {context.run.folder}"
    return page.note(f"How much of the score is the images' origin has not been audited: {command}")


# ---- the score in short --------------------------------------------------------------------------------------------


def _headline(run, tuned):
    if not tuned:
        return page.note("No score of these networks and settings: `tune` has not been run.")
    score = read_score(run)
    same = score["same_source"]
    cards = [
        (
            "AUROC out of fold",
            score["auroc"]["estimate"],
            f"{_range(score['auroc'])}; {score['images']:,} images of {score['patients']:,} patients",
        )
    ]
    if same is None:
        cards.append(
            (
                "AUROC, same collections",
                None,
                f"cannot be told: no image without {COVID} comes from the collections that have {COVID}",
            )
        )
    else:
        trained = "trained on too" if same["trained_on"] else "never trained on"
        cards.append(
            (
                "AUROC, same collections",
                same["auroc"]["estimate"],
                f"{_range(same['auroc'])}; {same['positives']:,} against {same['negatives']:,} images, "
                f"the latter {trained}",
            )
        )
    cards += [(name.capitalize(), score[name]["estimate"], f"{_range(score[name])}, at {HALF}") for name in RATES]
    return page.cards(cards)


def _range(interval):
    if interval["low"] is None:
        return "no interval"
    return f"95 % interval {interval['low']:.4f}–{interval['high']:.4f}"


# ---- data ----------------------------------------------------------------------------------------------------------


def _data(data, run):
    selection = read_selection(run)
    used, test = data.table[data.table["fold"] >= 0], data.table[data.table["split"] == "test"]
    main, same = ((used["role"] == role).sum() for role in ("main", "same_source"))
    text = (
        f"{len(selection):,} rows of tables; {main:,} images to train on and to score, of "
        f"{used.loc[used['role'] == 'main', 'patient_id'].nunique():,} patients; {same:,} of the {COVID} images' "
        f"own collections that are only scored; {len(test):,} to predict."
    )
    folds = used.groupby(["fold", "role", "label"]).size().unstack(["role", "label"], fill_value=0)
    folds.columns = ["only scored" if role == "same_source" else LABELS[label] for role, label in folds]
    folds = folds[[name for name in (COVID, WITHOUT, "only scored") if name in folds]].reset_index()
    folds.insert(1, "patients", used.groupby("fold")["patient_id"].nunique().to_numpy())
    return page.section(
        "Data",
        text,
        page.table(left_out(selection), "Every row of the tables, and why it is not used"),
        page.table(folds, "Folds, by patient"),
        page.figure(plots.histogram(_by_label(used, "age"), "age, years", 20), "Ages, where they are known"),
    )


def left_out(selection):
    """Rows of the tables by collection and label: how many are used, and how many are left out for which reason.

    selection: what `data.read_selection` gives. Reasons that differ in a number or a name alone are counted as one.
    """
    reasons = selection["reason"].str.replace(r"(same (?:image|file)) as (?!a test image).*", r"\1", regex=True)
    reasons = reasons.str.replace(r"\s*[:(\d].*|(?<=the test image) .*", "", regex=True)
    rows, collections = [], selection["collection"].unique().tolist()
    kinds = dict(list(selection.groupby(["collection", "label"])))
    for collection, label in sorted(kinds, key=lambda kind: (collections.index(kind[0]), -kind[1])):
        part = kinds[collection, label]
        why = reasons[part.index[~part["kept"]]].value_counts()
        rows.append(
            {
                "collection": collection,
                "label": LABELS[label],
                "rows": len(part),
                "used": int(part["kept"].sum()),
                "left out": int(why.sum()),
                "because of": ", ".join(f"{n:,} {reason}" for reason, n in why.items()),
            }
        )
    return pd.DataFrame(rows)


def _by_label(table, column):
    """A column's values by the names of the labels, COVID-19 first."""
    return {name: table.loc[table["label"] == label, column] for label, name in LABELS.items()}


def _lungs(context, data):
    config, selection = context.config, read_selection(context.run)
    shares = rejected_shares(selection)
    rejected = pd.DataFrame(
        [
            {"images": name, "came": n, "rejected": round(share * n), "share": share}
            for name, (share, n) in shares.items()
        ]
    )
    areas = {name: 100 * values for name, values in _by_label(data.table[data.table["ok"]], "area").items()}
    area = plots.histogram(areas, "lungs, % of the image", threshold=100 * config.lungs.gate)
    sees = "the lungs alone" if config.view == "lungs" else "the whole image"
    return page.section(
        "Lungs",
        f"This run's networks see {sees}. The dashed line is the gate: images with less are left out.",
        page.grid(
            page.table(rejected, "Images that came to the gate", {"share": ".4f"}),
            page.figure(area, "Area of the lungs, widened as they are"),
        ),
        *pictures.lungs(data, selection),
    )


# ---- the score at length -------------------------------------------------------------------------------------------


def _folds(run):
    folds, score, tables = read_per_fold(run), read_score(run), {}
    half = folds[folds["rule"] == str(HALF)].reset_index(drop=True)
    for rule, part in folds.groupby("rule"):
        tables[rule] = _fold_rows(part, score if rule == str(HALF) else score["tuned"])
    mean = {"network": "this run", **half[list(RATES)].mean()}
    published = pd.DataFrame(
        [mean]
        + [
            {"network": f"{name} (paper)", **dict(zip(RATES, np.divide(values, 100), strict=True))}
            for name, values in PUBLISHED.items()
        ]
    )
    names = [*(f"fold {fold}" for fold in half["fold"]), "all images"]
    drawn = {
        name: [*half[[name, f"{name}_low", f"{name}_high"]].to_numpy(float), numbers(score[name])] for name in RATES
    }
    caption = "Folds with Wilson's intervals, which take images for independent; all images with those by patient"
    return page.section(
        "Folds",
        page.table(tables.pop(str(HALF)), f"At the probability {HALF}"),
        page.details(
            "At thresholds by Youden's index, each fold's chosen on the others",
            *[page.table(table) for table in tables.values()],
        ),
        page.figure(class_plots.forest(drawn, names, "share"), caption),
        page.grid(*_confusions(half)),
        page.table(
            published, "Means of folds, beside what the paper reports on its own images", dict.fromkeys(RATES, ".4f")
        ),
    )


def _fold_rows(part, pooled):
    """The table of one rule as it is shown: figures with their intervals, the mean of folds, all images together."""
    shown = part[["fold", "images", "tp", "fn", "tn", "fp"]].astype(object)
    for name in RATES:
        values = part[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
        shown[name] = [with_interval(*row) for row in values]
    mean = {"fold": "mean ± sd", **{name: f"{part[name].mean():.4f} ± {part[name].std():.4f}" for name in RATES}}
    counts = part[["images", "tp", "fn", "tn", "fp"]].sum().to_dict()
    every = {"fold": "all images", **counts, **{name: with_interval(*numbers(pooled[name])) for name in RATES}}
    table = pd.concat([shown, pd.DataFrame([mean, every], dtype=object)], ignore_index=True)
    return table.astype(dict.fromkeys(counts, "Int64"))


def _confusions(half):
    """The fold with the best accuracy and the one with the worst; all images together where folds do not differ."""
    best, worst = half["accuracy"].idxmax(), half["accuracy"].idxmin()
    chosen = {
        f"Best fold, {half['fold'][best]}": half.loc[[best]],
        f"Worst fold, {half['fold'][worst]}": half.loc[[worst]],
    }
    if half["accuracy"].nunique() == 1:
        chosen = {"All images": half}
    figures = []
    for title, rows in chosen.items():
        tn, fp, fn, tp = rows[["tn", "fp", "fn", "tp"]].sum()
        counts = plots.confusion_matrix([[tn, fp], [fn, tp]], [WITHOUT, COVID])
        figures.append(page.figure(counts, f"{title}: accuracy {(tn + tp) / (tn + fp + fn + tp):.4f}"))
    return figures


def _answers(oof):
    main, label = oof[oof["role"] == "main"], oof["label"].to_numpy(float)
    truth = {"all that is scored": np.where(oof["role"] == "main", label, np.nan)}
    if (oof["home"] & (label == 0)).any():
        truth["the same collections alone"] = np.where(oof["home"], label, np.nan)
    columns = np.stack(list(truth.values()), 1)
    probs = np.repeat(oof["probability"].to_numpy()[:, None], len(truth), 1)
    figures = [
        page.figure(plots.roc_curve(columns, probs, list(truth)), "ROC curve out of fold, with the area under it"),
        page.figure(
            plots.histogram(_by_label(main, "probability"), "probability", threshold=HALF), "Probabilities by label"
        ),
    ]
    for k, part in oof.groupby("label", sort=False):
        groups = {name: images["probability"] for name, images in part.groupby("collection")}
        if len(groups) > 1:
            drawn = plots.histogram(groups, "probability", threshold=HALF)
            figures.append(page.figure(drawn, f"{LABELS[k]}: probabilities by collection"))
    figures.append(page.figure(plots.reliability(main["label"], main["probability"]), "Reliability"))
    called = (oof["probability"] >= HALF).astype(int)
    rows = [
        {
            "collection": name,
            "label": LABELS[k],
            "images": len(part),
            "patients": part["patient_id"].nunique(),
            "answered rightly": (called[part.index] == k).mean(),
            "mean probability": part["probability"].mean(),
        }
        for (name, k), part in oof.groupby(["collection", "label"])
    ]
    four = {"answered rightly": ".4f", "mean probability": ".4f"}
    return page.section(
        "Out of fold", page.grid(*figures), page.table(pd.DataFrame(rows), f"By collection, at {HALF}", four)
    )


def _submission(run):
    step = run.step("submit")
    text = f"{step['rows']:,} rows. Validated."
    if step["neutral"]:
        text += f" {step['neutral']:,} images without lungs that can be judged have the mean probability."
    if step["hidden"]:
        text += f" AUROC on the sample's test images {step['hidden']['value']:.4f}."
    test = {"test images": read_parquet(run.path("test.parquet"))["probability"]}
    return page.section("Submission", text, page.figure(plots.histogram(test, "probability"), "Probabilities"))
