"""Classification of the user's own images: one network per fold; multilabel or multiclass."""

from dataclasses import replace
from functools import cache, lru_cache

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, confusion_matrix
from tqdm import tqdm

from common.data.augment import compose, light
from common.data.loaders import FeatureDataset, eval_loader
from common.infer import tta
from common.metrics import classification as metrics
from common.metrics.calibration import choose_thresholds, nested_counts
from common.metrics.statistics import as_interval, as_json, bootstrap, bootstrap_auroc, format_interval
from common.network import Network, other_folds, predict
from common.nn.classifier import build_classifier
from common.paths import read_parquet
from common.recipe import Choice
from solutions.own import data
from solutions.own.labels import TRUE_CLASS

RATES = ("sensitivity", "specificity", "f1", "accuracy")
MOST_WEIGHT, MOST_REPEATS = 20.0, 10


@lru_cache(1)
@torch.inference_mode()
def pooled_features(images, config, device, workers):
    """Return the pretrained backbone's features of all training images, float32 (rows of the store, K)."""
    model, rows = build_classifier(config).to(device).eval(), np.union1d(images.rows(), np.array([*images.taught], int))
    found = np.zeros((len(images.store.images), model.head.in_features), np.float32)
    loader = eval_loader(data.dataset(images, rows, config.size), 2 * config.batch_size, workers)
    for batch, at in tqdm(loader, "features", leave=False):
        found[at.numpy()] = model.pooled(batch.to(device)).cpu().numpy()
    return found


def truth_of(images, rows):
    """Return the labels of store rows, float32 (n, C) of 0, 1 and NaN for unknown."""
    return images.at(rows)[images.about["classes"]].to_numpy(np.float32)


def label_loss(logits, target, weight=None, multiclass=False):
    """Return the mean cross-entropy for labels (B, C), NaN if unknown; weight: (C,), of positives or of classes."""
    weight = None if weight is None else torch.as_tensor(weight, device=logits.device)
    if multiclass:
        shares = target if weight is None else target * weight
        return -(shares * logits.log_softmax(1)).sum() / shares.sum()
    known = ~target.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(), pos_weight=weight, reduction="none")
    return (losses * known).sum() / known.sum().clamp_min(1)


def class_weights(truth, multiclass):
    """Return weights (C,) from labels (n, C): negatives per positive, or n / (C · images of the class); 1/20 to 20."""
    positive, known = np.nansum(truth, axis=0), (~np.isnan(truth)).sum(axis=0)
    weights = (len(truth) / truth.shape[1] if multiclass else known - positive) / np.maximum(positive, 1)
    return np.clip(weights, 1 / MOST_WEIGHT, MOST_WEIGHT).astype(np.float32)


def repeat_rare(rows, truth):
    """Return store rows repeated to balance the classes, an image as often as the rarest of its classes requires."""
    counts = np.nansum(truth, axis=0)
    factors = np.maximum(counts.max(), (truth == 0).all(axis=1).sum()) / np.maximum(counts, 1)
    repeats = np.where(truth > 0, np.clip(np.round(factors), 1, MOST_REPEATS), 1).max(axis=1)
    return np.repeat(rows, repeats.astype(int))


def network(job, fold):
    """Return the network of one fold."""
    config, multiclass = job.config.classifier, job.config.task == "multiclass"

    @cache
    def weights():
        return class_weights(truth_of(job.images, other_folds(job, fold)[0]), multiclass)

    def dataset(job, rows, augment, targets):
        images = job.images
        if config.only_head and targets:
            features = pooled_features(images, config, job.device, job.workers)
            return FeatureDataset(torch.tensor(features[rows])[:, None], torch.tensor(truth_of(images, rows)))
        labels = dict(zip(rows.tolist(), truth_of(images, rows), strict=True)).__getitem__ if targets else None
        transform = augmentation(config.augmentation, job.config.flip) if augment else None
        return data.dataset(images, rows, config.size, transform, labels)

    def rows(job, fold):
        rows, held_out = other_folds(job, fold)
        return repeat_rare(rows, truth_of(job.images, rows)) if config.balanced else rows, held_out

    def figures(job, logits, rows):
        truth = truth_of(job.images, rows)
        found = {"auroc": metrics.mean_of_defined(metrics.aurocs(truth, logits))}
        return found | ({"accuracy": float((logits.argmax(1) == truth.argmax(1)).mean())} if multiclass else {})

    return Network(
        fold,
        "classifier",
        config,
        lambda weights=None: build_classifier(config, len(job.images.about["classes"]), weights),
        dataset,
        loss=lambda *pair: label_loss(*pair, weights() if config.class_weights else None, multiclass),
        couples=True,  # the loss is a mean over known labels, or weighted by class
        measure=lambda logits, target: logits.float(),
        figures=figures,
        rows=rows,
        freeze=(lambda model, frozen: model.net.requires_grad_(False)) if config.only_head else None,
        activation=(lambda logits: logits.float().softmax(1)) if multiclass else tta.sigmoid,
        key=[job.config.task, job.config.flip],
    )


def augmentation(name, flip):
    """Return the named augmentation, or None for none; it mirrors images only if `flip`."""
    if name == "none":
        return None
    return light() if flip else compose(light().transforms[1:])


def predict_rows(job, folds, rows, path, title):
    """Return the class probabilities of store rows, averaged over the folds' networks."""
    classes, views = job.images.about["classes"], tta.views(job.config.tta)
    trained = [network(job, fold) for fold in folds]
    probs = predict(job, trained, rows, views, title) if len(rows) else np.empty((0, len(classes)))
    table = pd.DataFrame(probs.astype(float), columns=classes)
    return {"": pd.concat([job.images.named(rows), table], axis=1)}


def class_row(truth, probs, parts, groups, area):
    """Return the metrics of one class over the images whose label is known; area: the Interval of its AUROC."""
    known = ~np.isnan(truth)
    y, p, part, people = truth[known, None], probs[known, None], parts[known], groups[known]
    row = {"images": len(y), "positive": int(y.sum()), "positive_patients": len(set(people[y[:, 0] > 0].tolist()))}
    row |= dict.fromkeys(("auroc", "low", "high", "average_precision", "threshold", *RATES), np.nan)
    if len(set(people.tolist())) > 1 and len(set(part.tolist())) > 1:
        row |= {"auroc": area.estimate, "low": area.low, "high": area.high}
        precision = average_precision_score(y[:, 0], p[:, 0]) if y.any() else np.nan
        row |= {"average_precision": precision, "threshold": choose_thresholds(y, p)[0]}
        (counts,), _ = nested_counts(y, p, part)
        rates = metrics.recall(counts, np.nan), metrics.specificity(counts, np.nan)
        row |= dict(zip(RATES, (*rates, metrics.f_beta(counts), metrics.accuracy(counts)), strict=True))
    return row


def choose(job, oof):
    """Choose each class's threshold by Youden's index; score the thresholds, nested, and the AUROC of each class."""
    classes, rows, seed = job.images.about["classes"], oof.table["row"], job.config.seed
    truth, probs, groups = truth_of(job.images, rows), oof.table[classes].to_numpy(), job.images.groups(rows)
    parts = data.parts_of(job, rows)
    areas, mean = bootstrap_auroc(truth, probs, groups, seed=seed, skip_undefined=True)
    table = [class_row(truth[:, k], probs[:, k], parts, groups, area) for k, area in enumerate(areas)]
    table = pd.DataFrame(table).assign(label=classes).set_index("label").reset_index()
    figures = {"auroc": as_interval(mean)} | data.counts(job, rows)
    figures |= {name: as_json(table[name].mean()) for name in ("average_precision", "f1")}
    rule = {name: as_json(value) for name, value in zip(classes, table["threshold"], strict=True)}
    tables = {"classes.csv": table}
    if job.config.task == "multiclass":
        figures["accuracy"] = as_interval(bootstrap(probs.argmax(1) == truth.argmax(1), groups, seed=seed))
        counts = confusion_matrix(truth.argmax(1), probs.argmax(1), labels=range(len(classes)))
        tables["confusion.csv"] = pd.DataFrame(counts, classes, classes).reset_index(names=TRUE_CLASS)
        figures["f1"] = float(metrics.ratio(2 * np.diag(counts), counts.sum(0) + counts.sum(1), 0.0).mean())
    return Choice({"thresholds": rule}, figures["auroc"]["estimate"] or 0.0, figures, tables)


def describe(figures):
    """Return the lines that report the score."""
    line = f"out of fold, {data.size_text(figures)}: mean AUROC {format_interval(figures['auroc'])}"
    more = f"; accuracy {format_interval(figures['accuracy'])}" if "accuracy" in figures else ""
    return [f"{line}{more}; thresholds nested by {figures['nested_by']}"]


def answer(job, test, rule, neutral):
    """Return image_id and one probability per class for each image; unreadable images get the neutral ones."""
    classes, images = job.images.about["classes"], job.images.at(test.table["row"])
    probs = test.table[classes].to_numpy(copy=True)
    probs[~images["ok"].to_numpy()] = [neutral[name] for name in classes]
    text = pd.DataFrame(probs, columns=classes).map(lambda value: f"{value:.6g}")
    return pd.concat([test.table[["image_id"]].reset_index(drop=True), text], axis=1)


def refine(job, listing, store):
    """Return the listing with the input images of `data.add_view`, and without tables, which classes do not need."""
    return data.add_view(job, replace(listing, tables={}), store)


FURTHER = {
    "neutral": lambda job: read_parquet(job.run.path("oof.parquet"))[job.images.about["classes"]].mean().to_dict(),
    "hidden": "hidden/truth.csv",
}
