"""Lung segmentation (Berger et al., section 3.3): a network's probabilities and the rule that turns them into masks."""

from functools import partial

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import from_dict
from common.errors import log
from common.images import trainings
from common.infer.tta import views
from common.metrics.segmentation import dice_from_areas
from common.metrics.statistics import format_interval
from common.network import predict
from common.paths import write_csv
from common.post.rle import ABSOLUTE, decode, encode
from common.recipe import Choice, Solution
from common.step import run_step
from common.submit.table import read_table
from common.submit.validate import validate_shaped_masks
from common.train import distributed
from common.tuning import tune_nested
from solutions.lung_segmentation import augment, data, experiments, models, postprocess, report
from solutions.lung_segmentation.comparison import COMPARISON
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.pairs import write_png

PREPARED = ("n_folds", "seed", "store_size", "structures", "datasets")  # settings that `prepare` depends on


def lung_network(config, fold):
    """Return the network of one fold, with one channel per structure; the decoder is trained first, then all layers."""
    network, channels = config.network, len(STRUCTURES[config.structures])
    flip = config.structures == "lungs" or network.augmentation == "strong"

    def dataset(job, rows, augmented, targets):
        transform = augment.pipeline(network.augmentation, network.size, flip) if augmented else None
        return job.images.dataset(rows, network.size, transform, partial(data.mask, job.images) if targets else None)

    build, how = partial(models.build_network, network, channels), {"rows": data.split_rows, "watched": ("dice",)}
    return models.mask_network(fold, "network", network, build, dataset, channels, **how)


def find_learning_rate_first(job):
    """Run the paper's range test before the first training, if the configuration asks for it."""
    if job.config.finder and not trainings(job.run):
        if distributed.world() > 1:
            log.info("skipped the range test, which runs in one process only (`find_lr`)")
        else:
            run_step(job, job.steps["find_lr"])


def predict_rows(job, folds, rows, path, title):
    """Write the probabilities of store rows to `path` and return a table of the rows."""
    config = job.config
    seen = views(config.tta, config.structures != "lungs")
    predict(job, [lung_network(config, f) for f in folds], rows, seen, title, path)
    return {"": job.images.named(rows)}


def choose(job, oof):
    """Choose pixel threshold and number of regions by Dice at the original sizes; score folds by the others' rule."""
    config, table, tried = job.config, oof.table, postprocess.rules(job.config.decision)
    truth = partial(data.true_masks, job.images)
    areas = postprocess.measure(truth, table["row"], oof.maps, tried, config.structures)
    dice = dice_from_areas(*areas[:, :, 0].transpose(2, 1, 0)[:3])  # (rules, images), of the lungs
    position = {rule: number for number, rule in enumerate(tried)}
    about = job.images.at(table["row"]).drop(columns=["image_id", "row", "fold"])
    patients, folds = about["patient_id"].to_numpy(), table["fold"].to_numpy()
    tuned = tune_nested(tried, lambda rule: dice[position[rule]], folds, patients, config.seed)
    log.info(f"compared {len(tried)} rules: {tuned.rule}")
    chosen = areas[np.arange(len(table)), [position[tuned.fold_rules[part]] for part in tuned.parts]]
    scored = pd.concat([table, about.reset_index(drop=True)], axis=1)
    figures, scored = postprocess.figures(scored, chosen, config.structures)
    figures |= {"folds": list(config.folds), "n_folds": config.n_folds, "seed": config.seed}
    tables = {"surface.csv": tuned.surface("dice"), "oof_dice.parquet": scored}
    return Choice(tuned.as_dict(), tuned.score, figures, tables)


def describe(figures):
    """Return the lines that report the score on all images and on each dataset."""
    means = "precision {precision[estimate]:.4f}, recall {recall[estimate]:.4f}, accuracy {accuracy[estimate]:.4f}"
    return [
        f"{name}: dice {format_interval(part['dice'])} (mean over {part['images']} images), "
        f"{format_interval(part['dice_pooled'])} (pooled pixels), {means.format_map(part)}"
        for name, part in {"all": figures, **figures["datasets"]}.items()
    ]


def answer(job, test, rule, neutral):
    """Return the submission (image_id, width, height, rle) at the images' original sizes; write rejected.csv."""
    rule = from_dict(postprocess.MaskRule, rule.get("rule"), "tuned.json: rule")
    about, rows, rejected = job.images.at(test.table["row"]), [], []
    for image, probs in zip(tqdm(about.itertuples(), "masks", len(about), leave=False), test.maps, strict=True):
        mask = rule.lungs(np.asarray(probs), (image.height, image.width), job.config.structures) * np.uint8(image.ok)
        rows.append((image.image_id, image.width, image.height, encode(mask, ABSOLUTE, neutral)))
        verdict = postprocess.apply_gate(postprocess.clean_up(mask))
        if not verdict.ok:
            rejected.append((image.image_id, verdict.reason))
    if rejected:
        log.info(f"the area gate would reject {len(rejected)} of {len(rows)} masks")
    write_csv(job.run.path("rejected.csv"), pd.DataFrame(rejected, columns=["image_id", "reason"]))
    return pd.DataFrame(rows, columns=data.COLUMNS)


def check_and_draw(path, job):
    """Validate a submission and write its masks as masks/<image_id>.png in the run, or beside a file outside it."""
    images = job.images.table[job.images.table["split"] == "test"]
    summary = validate_shaped_masks(path, images, ABSOLUTE)
    of_run = path.parent == job.run.folder
    folder = job.run.path("masks") if of_run else path.with_name(f"{path.stem}_masks")
    for row in read_table(path).itertuples():
        pixels = decode(row.rle, (int(row.height), int(row.width)), ABSOLUTE) * np.uint8(255)
        write_png(folder / f"{row.image_id}.png", pixels)
    if of_run:
        for stale in {png for png in folder.glob("*.png") if png.stem not in set(images["image_id"])}:
            stale.unlink()
    log.info(f"masks in {folder}")
    return summary


SOLUTION = Solution(
    "lung_segmentation",
    "dice",
    made_with=lambda config: {name: getattr(config, name) for name in PREPARED},
    read=data.read_competition,
    refine=data.keep_usable,
    read_test=data.read_test,
    refine_test=data.check_test,
    networks=lambda job: [lung_network(job.config, fold) for fold in job.config.folds],
    before_training=find_learning_rate_first,
    predict=predict_rows,
    maps=True,
    choose=choose,
    chosen=("oof_dice.parquet", "surface.csv"),
    describe=describe,
    neutral=lambda job: "-1",
    answer=answer,
    answered=("rejected.csv", "masks"),
    check=check_and_draw,
    comparison=COMPARISON,
    hidden="hidden",
    report=report,
    further_steps=(experiments.ABLATION, experiments.CROSS),
    further_verbs={"export_segmenter": experiments.export_segmenter},
)
