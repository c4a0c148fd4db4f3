"""SIIM pneumothorax (paper: Țimbuș et al., VISAPP 2021): a gate, a segmenter, and a rule that combines them."""

from dataclasses import replace
from functools import partial

import numpy as np

from common import detection
from common.config import from_dict
from common.data.augment import enrichment_plan, paper_siim_enrichment
from common.data.loaders import sliding_rate
from common.infer import tta
from common.metrics import segmentation
from common.metrics.statistics import as_interval, as_json, bootstrap, format_interval
from common.network import Network, other_folds, predict
from common.nn.losses import bce
from common.nn.models import freeze_all_but_head, freeze_first_half, segmenter
from common.recipe import Choice, Solution
from common.submit.validate import validate_masks
from common.tuning import Rule, nested_areas, rule_dice, tune_nested
from solutions.siim_pneumothorax import data, experiments, models, postprocess, report
from solutions.siim_pneumothorax.comparison import COMPARISON
from solutions.siim_pneumothorax.config import SIZE


def networks(job):
    """Return each fold's gate, then its segmenters at increasing sizes."""
    config, trainings = job.config, []
    for fold in config.folds:
        trainings += [gate_network(config.classifier, fold)] if config.has_gate else []
        trainings += [network for chain in segmenter_chains(config, fold) for network in chain]
    return trainings


def segmenter_chains(config, fold):
    """Return a list of the `segmenter_networks` of each segmenter in the ensemble."""
    chains = [segmenter_networks(config, fold)]
    for name in config.more_segmenters:
        architecture, _, encoder = name.partition("-")
        one = replace(config.segmenter, architecture=architecture, encoder=encoder)
        chains.append(segmenter_networks(replace(config, segmenter=one, more_segmenters=()), fold, name))
    return chains


def gate_network(config, fold):
    """Return the gate: its new last layer is trained first, then all layers (4.1.1)."""
    augmentation = partial(models.augmentation, config.augmentation, config.size)
    plain = detection.gate_network(fold, "classifier", config, data.presence, augmentation=augmentation)

    def enriched(job, rows, augment, targets):
        if not augment:
            return plain.dataset(job, rows, augment, targets)
        present, transforms = data.presence(job.images, rows), paper_siim_enrichment()
        indices, kinds = enrichment_plan(present > 0.5, len(transforms), job.config.seed)
        target = dict(zip(rows.tolist(), present[:, None].astype(np.float32), strict=True)).__getitem__
        return job.images.dataset(rows[indices], config.size, transforms, target, kinds)

    return replace(
        plain,
        dataset=enriched if config.enrichment else plain.dataset,
        loss=partial(bce, pos_weight=None if config.positive_weight == 1 else config.positive_weight),
        figures=lambda job, probs, rows: models.gate_figures(data.presence(job.images, rows), probs),
        freeze=freeze_all_but_head,
        activation=tta.sigmoid,
    )


def segmenter_networks(config, fold, name="segmenter"):
    """Return one fold's segmenter at each size; each starts from the weights of the previous size (4.1.2)."""
    first, trainings = config.segmenter, []
    epochs = [first.epochs, *[first.finer_epochs or first.epochs] * (len(first.sizes) - 1)]
    finer = {"frozen_epochs": 0, "lr": first.finer_lr, "batch_size": first.finer_batch_size}
    finer |= {"loss": first.finer_loss or first.loss}
    if finer["loss"] != "focal_dice":
        finer["focal_weight"] = 1.0
    for k, size in enumerate(first.sizes):
        part = replace(first, epochs=epochs[k], **finer if k else {})
        if first.positive_rate:
            ends = np.array([sum(epochs[:k]), sum(epochs[: k + 1]) - 1]) / max(1, sum(epochs) - 1)
            part = replace(part, positive_rate=tuple(map(sliding_rate(*first.positive_rate), ends.tolist())))
        again = f"-{k + 1}" if size in first.sizes[:k] else ""
        trainings.append(segmenter_network(part, fold, size, trainings[-1] if k else None, f"{name}-{size}{again}"))
    return trainings


def segmenter_network(config, fold, size, before=None, stage=""):
    """Return the segmenter at one size; the validation images are sampled to the same share of negatives."""
    mask_term, shape = models.mask_loss(config), (config.architecture, config.encoder)

    def dataset(job, rows, augment, targets):
        crop = config.crop if augment else 0
        transform = models.augmentation(config.augmentation, size, crop) if augment else None
        target = partial(data.mask, job.images) if targets else None
        return job.images.dataset(rows, size, transform, target, crop=crop)

    def build(weights=None):
        options = {"empty_head": config.presence_head, "frozen_norms": config.finer_frozen_norms and before is not None}
        return segmenter(*shape, weights or config.weights, **options)

    def loss(output, masks):
        if not isinstance(output, tuple):
            return mask_term(output, masks)
        present = masks.flatten(1).amax(1, keepdim=True).float()
        return mask_term(output[0], masks) + bce(output[1], present)

    def some(job, rows):
        if config.positives_only:
            return rows[data.presence(job.images, rows) > 0.5]
        negatives = 0 if config.positive_rate else config.negatives  # the rate chooses among all
        return data.sample_negatives(job.images, rows, negatives, job.config.seed + fold)

    def sampling(job, rows):
        if not config.positive_rate:
            return {}
        present = data.presence(job.images, rows) > 0.5
        return {"positives": present, "positive_rate": sliding_rate(*config.positive_rate)}

    return Network(
        fold,
        stage or f"segmenter-{size}",
        config,
        build,
        dataset,
        loss=loss,
        measure=models.mask_areas,
        figures=lambda job, areas, rows: models.mask_figures(areas, size),
        rows=lambda job, fold: [some(job, part) for part in other_folds(job, fold)],
        taught=some,
        freeze=freeze_first_half,
        sampling=sampling,
        starts_from=before,
        activation=tta.sigmoid_and_presence if config.presence_head else tta.sigmoid,
        channels=1,
    )


def predict_rows(job, folds, rows, path, title):
    """Write mask probabilities to `path`; return a table with each row's presence probability, 1 if none is used."""
    config = job.config
    masks = [chain[-1] for fold in folds for chain in segmenter_chains(config, fold)]
    found, present = predict(job, masks, rows, tta.views(config.tta), title, path), []
    if config.presence in ("head", "mean"):
        present.append(found[1])
    if config.has_gate:
        gates = [gate_network(config.classifier, fold) for fold in folds]
        present.append(predict(job, gates, rows, tta.views(config.tta), title)[:, 0])
    present = np.mean(present, axis=0) if present else np.ones(len(rows), np.float32)
    return {"": job.images.named(rows).assign(presence=present)}


def choose(job, oof):
    """Choose the rule with the best out-of-fold mean Dice; score it nested over folds, or halves of a single fold."""
    decision, table, seed = job.config.decision, oof.table, job.config.seed
    tried, regions = postprocess.rules(decision), postprocess.oof_regions(job, oof)
    gate, patients = table["presence"].to_numpy(float), job.images.patients(table["row"])
    tuned = tune_nested(tried, lambda rule: rule_dice(regions, rule, gate), table["fold"].to_numpy(), patients, seed)
    both, predicted, true = nested_areas(regions, tuned.fold_rules, tuned.parts, gate)
    cells, present = segmentation.counts_from_areas(both, predicted, true, SIZE * SIZE), regions.truth > 0
    groups = job.images.groups(table["row"])
    positive = bootstrap(np.where(present, tuned.dice, np.nan), groups, skip_nan=True) if present.any() else None
    figures = {
        "dice": as_interval(bootstrap(tuned.dice, groups)),
        "dice_positive": None if positive is None else as_interval(positive),
        "dice_not_nested": tuned.naive,
        "dice_all_empty": float((~present).mean()),
        "iou": segmentation.iou(cells, reduce="image"),
        "f1": segmentation.f_beta(cells, 1, reduce="image"),
        "f2": segmentation.f_beta(cells, 2, reduce="image"),
        "images": len(table),
        "positive": int(present.sum()),
        "folds": list(job.config.folds),
        "patients": None if patients is None else len(set(patients)),
        "nested_by": "halves of the patients" if tuned.halves else "folds",
    }
    if job.config.presence != "none":
        at_half = models.gate_figures(present.astype(int), gate)
        figures["presence"] = {name: as_json(value) for name, value in at_half.items()}
    scored = table.assign(dice=tuned.dice, part=tuned.parts, present=present.astype(int))
    tables = {"surface.csv": tuned.surface("dice"), "oof_dice.parquet": scored}
    return Choice(tuned.as_dict(), tuned.score, figures, tables)


def describe(figures):
    """Return the lines that report the score."""
    empty = f"(all-empty {figures['dice_all_empty']:.4f}), nested by {figures['nested_by']}"
    return [f"out-of-fold dice {format_interval(figures['dice'])} over {figures['images']} images {empty}"]


def answer(job, test, rule, neutral):
    """Return the submission, ImageId and EncodedPixels; an image that could not be read gets an empty mask."""
    rule = from_dict(Rule, rule.get("rule"), "tuned.json: rule")
    gate, connectivity = test.table["presence"].to_numpy(float), job.config.decision.connectivity
    rows = postprocess.submission_rows(test.table["image_id"], test.maps, gate, rule, connectivity)
    rows.loc[~job.images.at(test.table["row"])["ok"].to_numpy(), "EncodedPixels"] = neutral
    return rows


SOLUTION = Solution(
    "siim_pneumothorax",
    "dice",
    read=data.read_competition,
    refine=data.refuse_oblong,
    read_test=data.read_test,
    soft_labels=lambda found: found.table.rename(columns={"presence": "present"}),
    networks=networks,
    predict=predict_rows,
    maps=True,
    choose=choose,
    chosen=("oof_dice.parquet", "surface.csv"),
    describe=describe,
    neutral=lambda job: "-1",
    answer=answer,
    check=lambda path, job: validate_masks(path, job.sample_path, ordered=True),
    comparison=COMPARISON,
    hidden="hidden/truth.csv",
    report=report,
    further_steps=(experiments.ABLATION,),
)
