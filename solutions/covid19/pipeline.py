"""COVID-19 (Ahmed et al., 2020): one network per fold that sees only the lungs, and an audit of its probabilities."""

from dataclasses import replace

import numpy as np
import pandas as pd

from common.errors import log
from common.infer.tta import views
from common.metrics.statistics import format_interval
from common.network import predict
from common.paths import read_parquet
from common.recipe import Choice, Solution
from common.step import Step
from solutions.covid19 import audit, comparison, data, models, report
from solutions.covid19.data import weights_file

SEGMENTER = "lungs.safetensors"  # name of the lung segmenter in an exported folder


def predict_rows(job, folds, rows, path, title):
    """Return the probability of each image that can be predicted, averaged over the folds' networks."""
    rows = rows[data.can_predict(job.images.at(rows), job.config)]
    trained = [models.covid_network(job.config, fold) for fold in folds]
    probs = predict(job, trained, rows, views(job.config.tta), title)[:, 0].astype(float) if len(rows) else []
    return {"": pd.DataFrame({"image_id": job.images.ids(rows), "probability": probs})}


def choose(job, oof):
    """Choose the threshold by Youden's index; score at the paper's 0.5 and with thresholds from the other folds."""
    table = comparison.with_truth(job.images, oof.table)
    main = table[table["role"] == "main"]
    chosen, cuts = comparison.nested_thresholds(main, job.config.seed)
    by_fold = {str(fold): sorted(set(cuts[main["fold"] == fold])) for fold in main["fold"].unique()}
    figures = comparison.summarise(table, cuts, job.config.seed)
    rule = {"threshold": chosen, "by_fold": by_fold}  # a single fold has one threshold per half
    tables = {"per_fold.csv": comparison.fold_table(main, np.full(len(main), comparison.HALF))}
    return Choice(rule, figures["auroc"]["estimate"], figures, tables)


def describe(figures):
    """Return the lines that report the score and the score on images from the same collections."""
    rates = ", ".join(f"{name} {format_interval(figures[name])}" for name in comparison.RATES)
    size = f"{figures['images']:,} images of {figures['patients']:,} patients"
    lines = [f"out of fold, {size}: AUROC {format_interval(figures['auroc'])}; {rates} at {comparison.HALF}"]
    if same := figures["same_source"]:
        text = f"AUROC {format_interval(same['auroc'])}, specificity {format_interval(same['specificity'])}"
        return [*lines, f"against the {same['negatives']:,} images without COVID-19 of the same collections: {text}"]
    none = "no image without COVID-19 comes from the collections of the COVID-19 images"
    return [*lines, f"{none}, so this run cannot show how much of the score reflects the images' origin"]


def answer(job, test, rule, neutral):
    """Return the submission: filename and probability of each test image."""
    images = job.images.table[job.images.table["split"] == "test"]
    probs = images["image_id"].map(test.table.set_index("image_id")["probability"])
    absent = images.loc[probs.isna(), "file_name"].tolist()
    if absent:
        what = f"{len(absent)} test images without usable lungs get the mean probability {neutral:.3f}"
        log.info(f"{what}: {', '.join(absent)}")
    values = [f"{value:.6g}" for value in probs.fillna(neutral)]
    return pd.DataFrame(dict(zip(data.SAMPLE, (images["file_name"].to_numpy(), values), strict=True)))


SOLUTION = Solution(
    "covid19",
    "auroc",
    made_with=data.made_with,
    read=data.read_competition,
    refine=data.refine,
    read_test=data.read_test,
    refine_test=data.refine_test,
    networks=lambda job: [models.covid_network(job.config, fold) for fold in job.config.folds],
    predict=predict_rows,
    prediction_key=lambda config: [config.tta, config.view],
    choose=choose,
    chosen=("per_fold.csv",),
    decision_key=lambda config: None,
    describe=describe,
    neutral=lambda job: float(read_parquet(job.run.path("oof.parquet"))["probability"].mean()),
    answer=answer,
    comparison=comparison.COMPARISON,
    hidden="hidden_test.csv",
    report=report,
    assets=lambda config: {SEGMENTER: weights_file(config)},
    use_assets=lambda config, files: replace(config, lungs=replace(config.lungs, weights=str(files[SEGMENTER]))),
    soft_labels=lambda found: found.table.rename(columns={"probability": "label"}),
    further_steps=(Step("audit", audit.run_audit, needs=("tune",), reads=audit.audit_key, files=audit.FILES),),
)
