"""The lungs' sections of the report: scores by dataset and structure, experiments, and pictures."""

import numpy as np
import pandas as pd

from common.data.dicom import read_image
from common.kaggle.session import display_gallery
from common.paths import KAGGLE_INPUT, find_images, read_array, read_csv, read_json, read_parquet
from common.post.rle import ABSOLUTE, decode
from common.report import page, plots, results
from common.report.frame import step_section
from common.report.gallery import gallery, pick_extremes
from common.submit.table import read_table
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.data import mask
from solutions.lung_segmentation.pairs import READ, bare_stem, find_pairs
from solutions.lung_segmentation.postprocess import MaskRule

TITLE = "Lung segmentation"
EXPERIMENTS = ("network-",)
# published Dice on these collections, with other splits than ours
PUBLISHED = (
    ("Shenzhen", "EAM-Net", 0.961),
    ("Montgomery", "EAM-Net", 0.982),
    ("Montgomery", "imlab-uiip", 0.972),
    ("JSRT", "Liu et al.", 0.98),
    ("both", "Berger et al.", 0.979),
    ("both", "Adv. ATTN (Gaál et al., from Berger et al.)", 0.962),
    ("both", "ATTN (Gaál et al., from Berger et al.)", 0.958),
)
FORMS = {"mean over images": "", "pooled pixels": "_pooled"}


def headline(job, score):
    """Return the Dice of all images and of each dataset as cards, and a note on the held-out images."""
    cards = [
        ("Dice, mean over images", score["dice"]["estimate"], _hint(score)),
        ("Dice, pooled pixels", score["dice_pooled"]["estimate"], page.range_text(score["dice_pooled"])),
    ]
    if len(score["datasets"]) > 1:
        cards += [(f"Dice, {name}", p["dice"]["estimate"], _hint(p)) for name, p in score["datasets"].items()]
    folds = ", ".join(map(str, score["folds"]))
    held_out = f"Held-out images (fold {folds} of {score['n_folds']}, seed {score['seed']}) at their original sizes."
    return [page.cards(cards), page.note(held_out)]


def _hint(part):
    return f"{page.range_text(part['dice'])}, {part['images']} images"


def sections(job):
    """Return the section on data and those on results that are current."""
    parts = [_data(job)]
    if job.is_current("tune"):
        parts += [_scores(job.run), _decision(job), *_pictures(job)]
    return [
        *parts,
        step_section(job, "ablate", "Ablation: simple and complex augmentation, Adam and SGD", _ablation),
        step_section(job, "cross", "Across datasets", _cross),
    ]


def _data(job):
    table, left_out = job.images.table, job.run.path("left_out.csv")
    train = table[table["split"] == "train"]
    counts = train.groupby(["fold", "dataset"]).size().unstack(fill_value=0).reset_index()
    areas = {name: 100 * part["area"] for name, part in train.groupby("dataset")}
    size = f"{len(train):,} images with masks, {(table['split'] == 'test').sum():,} to predict."
    drawn = page.figure(plots.histogram(areas, "lung area, % of the image"), "Lung area")
    fragments = [size, page.grid(page.table(counts, "Images by fold, split by patient"), drawn)]
    if left_out.is_file():
        fragments.append(page.table(read_csv(left_out, dtype=str), "Images that could not be used"))
    return page.section("Data", *fragments)


def _rows(groups, name, others):
    """Return a table of metrics (means over images, and over pooled pixels) and lines for a plot of the image means.

    groups: name of a row → metrics as in score.json; name: of the first column; others: metrics besides Dice.
    """
    rows = [
        {
            name: group,
            "images": part["images"],
            "as": form,
            "dice": page.interval_text(*part["dice" + suffix].values()),
            **{metric: part[metric + suffix]["estimate"] for metric in others},
        }
        for group, part in groups.items()
        for form, suffix in FORMS.items()
    ]
    return pd.DataFrame(rows), [(group, *part["dice"].values()) for group, part in groups.items()]


def _scores(run):
    score = read_json(run.path("score.json"))
    groups = {"all": score, **score["datasets"], **score["structures"]}
    rows, lines = _rows(groups, "images of", ("iou", "precision", "recall", "accuracy"))
    fragments = [page.figure(plots.score_with_interval(lines, "dice"), "Dice, mean over images")]
    if not run.step("prepare")["synthetic"]:
        published = pd.DataFrame(PUBLISHED, columns=["dataset", "by", "dice"])
        fragments.append(page.table(published, "Published for these collections, with other splits", {"dice": ".3f"}))
    table = page.table(rows, "Held-out images, with 95 % intervals by patient")
    return page.section("Scores", table, page.grid(*fragments))


def _decision(job):
    run, oof = job.run, read_parquet(job.run.path("oof_dice.parquet"))
    rule, surface = read_json(run.path("tuned.json"))["rule"], read_csv(run.path("surface.csv"))
    figures = results.rule_surface(surface, "pixel", "regions", "dice", rule, "Mean Dice of the rules compared")
    kept = f"the {rule['regions']} largest regions are kept" if rule["regions"] else "all regions are kept"
    text = f"Pixels with a probability of at least {rule['pixel']:g} are lung; {kept}."
    nested = "Each part of the images is scored with the rule chosen on the others."
    maps, names = read_array(job.run.maps("oof")), STRUCTURES[job.config.structures]
    figures.append(results.pixel_calibration(maps, lambda k: mask(job.images, oof["row"].iloc[k]), names))
    return page.section("Decision and calibration", f"{text} {nested}", page.grid(*figures))


def _pictures(job):
    ordered = read_parquet(job.run.path("oof_dice.parquet")).reset_index(drop=True).sort_values("dice", kind="stable")
    galleries = []
    for title, rows in pick_extremes(ordered).items():
        captions = rows["image_id"] + ": dice " + rows["dice"].map("{:.3f}".format)
        galleries.append(gallery(_outlines(job, "oof", rows, captions), title))
    text = "Green: the outline drawn by hand. Orange: the prediction, using the rule of the submission."
    listed = ordered[["image_id", "fold", "dataset", "dice", "iou"]]
    return [results.worst_errors(listed, text, galleries.pop()), page.section("Pictures", *galleries)]


def _outlines(job, name, rows, captions):
    """Yield the items of a gallery of rows of the predictions "oof" or "test"."""
    probs, images = read_array(job.run.maps(name)), job.images
    rule = MaskRule(**read_json(job.run.path("tuned.json"))["rule"])
    for position, row, caption in zip(rows.index, rows["row"], captions, strict=True):
        image, truth = images.store.images[row], mask(images, row)[:2].max(0) if name == "oof" else None
        yield image, truth, rule.lungs(np.asarray(probs[position]), image.shape, job.config.structures), caption


def _ablation(job):
    table, groups = read_csv(job.run.path("ablation.csv")), {}
    for row in table.to_dict("records"):
        names = [f"{name}{suffix}" for name in ("dice", "precision", "recall", "accuracy") for suffix in FORMS.values()]
        figures = {n: {"estimate": row[n], "low": row[f"{n}_low"], "high": row[f"{n}_high"]} for n in names}
        groups[row["augmentation"]] = {"images": row["images"], **figures}
    rows, lines = _rows(groups, "augmentation", ("precision", "recall", "accuracy"))
    paper = table[["augmentation", *(name for name in table if name.startswith("paper_"))]].dropna()
    paper = page.table(paper, "Berger et al., table 2", dict.fromkeys(paper.columns[1:], ".3f"))
    changes = table.dropna(subset="dice_change").itertuples()
    return [
        *(f"{r.augmentation} against simple: dice {r.dice_change:+.4f}, p = {r.p:.3f}. " for r in changes),
        page.table(rows, "Held-out images, with 95 % intervals by patient"),
        page.grid(page.figure(plots.score_with_interval(lines, "dice"), "Dice"), paper),
    ]


def _cross(job):
    table = read_csv(job.run.path("cross.csv"))
    lines = [(f"{row.trained} → {row.tested}", row.dice, row.dice_low, row.dice_high) for row in table.itertuples()]
    columns = ["trained", "trained_on", "tested", "images", "dice", "dice_low", "dice_high", "dice_pooled"]
    return [
        "Trained on one collection, scored on each; all: trained on all collections.",
        page.figure(plots.score_with_interval(lines, "dice"), "Dice, mean over images"),
        page.table(table[columns], "Dice, mean over images and over pooled pixels"),
    ]


def submission(job, record):
    """Return a note on where the masks are, and pictures of the first rejected and the first accepted ones."""
    test, rejected = read_parquet(job.run.path("test.parquet")), read_csv(job.run.path("rejected.csv"), dtype=str)
    reasons = test[["image_id"]].merge(rejected, "left")["reason"].fillna("")
    galleries = []
    for title, part in (("Rejected by the area gate", reasons != ""), ("First masks", reasons == "")):
        rows = test[part][:8]
        captions = (rows["image_id"] + " " + reasons[rows.index]).str.strip()
        galleries += [gallery(_outlines(job, "test", rows, captions), title)] * bool(len(rows))
    text = "Masks are in masks/ and as run-lengths in submission.csv."
    return [f"{text} {len(rejected)} of {len(test)} fail the area gate.", *galleries]


def show_predictions(submission, folder=None, count=4):
    """Show the first images with outlined lungs; they are in `folder` or in the mounted collections."""
    if folder is None:
        files = {pair.image_id: pair.image for pair in find_pairs(KAGGLE_INPUT)}
    else:
        files = {bare_stem(stem): path for stem, path in find_images(folder, READ).items()}
    items = []
    for row in read_table(submission)[:count].itertuples():
        mask = decode(row.rle, (int(row.height), int(row.width)), ABSOLUTE)
        items.append((read_image(files[row.image_id]), None, mask, f"{row.image_id}: {mask.mean():.0%} lung"))
    display_gallery(items)
