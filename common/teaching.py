"""Training targets from a finished run, the teacher: pseudo-labels of test images, soft targets of training images.

Networks of fold k learn only from the teacher's networks of fold k, which have not seen the images that fold k holds
out, nor their patients; so the out-of-fold score stays honest. Out-of-fold predictions would not do, since those of the
other folds come from networks that were trained on the labels of fold k.
"""

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common import processes
from common.blend import Member, mixing_of, write_mixed
from common.config import digest
from common.errors import InputError, check, log
from common.images import refuse_trainings
from common.infer.mixing import mixed_boxes, value_columns
from common.job import open_run
from common.listing import FURTHER
from common.options import LESSONS
from common.paths import read_parquet, write_table
from common.post.boxes import BOX, iou_matrix
from common.predictions import prediction_files, read_predictions
from common.runs import Run
from common.step import Step, key_of, require, run_step

KINDS = ("pseudo", "teacher")  # options that name a run, and steps of a run that learns from one
NAMED = "teachers"  # record of a run: those that its last command named
IOU = 0.5  # overlap from which a teacher's boxes are fused


def find_lessons(job):
    """Return the records of what the run's networks learn from teachers, by kind, after these have predicted.

    Without the options, the records are those of the run's earlier trainings. Raises InputError for a teacher whose
    networks have seen held-out images, and if trainings have begun with other lessons.
    """
    lessons, named = {}, job.run.step(NAMED) or {}
    for kind in KINDS:
        folder, lessons[kind] = getattr(job.options, kind), job.run.step(kind)
        if job.run.joined:
            asked, record = str(folder.resolve()) if folder else named.get(kind), lessons[kind] or {}
            where = f"the process that works in {job.run.folder}"
            missing = f"{where} has no predictions of this teacher, or not yet; start it again later"
            check(asked in (None, record.get("run")), f"--{kind} {folder or asked}: {missing}")
            for name, value in _settings(job.options, kind).items() if folder else ():
                told = f"--{kind}-{name} {value:g}: {where} uses {record.get(name, value):g}; give both the same"
                check(record.get(name, value) == value, told)
        if folder is not None and not job.run.joined:
            lessons[kind] = _ask_teacher(job, kind, folder)
        elif lessons[kind] is not None:
            log.info(f"{kind}: as before, from {lessons[kind]['run']}")
    return {kind: record for kind, record in lessons.items() if record}


def name_teachers(job):
    """Record in a prepared run which teachers this command names, for processes that join before these have predicted.

    Of an earlier command's, those that have not predicted are named in the log and forgotten. Raises InputError like
    `teachers_of`.
    """
    if job.run.joined:
        return
    before, now = job.run.step(NAMED) or {}, teachers_of(job)
    if job.run.step("prepare") is None:
        return
    for kind in KINDS:
        if kind in before and kind not in now and job.run.step(kind) is None:
            what = "named before, but it has not predicted; this command does without it"
            log.warning(f"--{kind} {before[kind]}: {what}")
    job.run.forget(NAMED)
    if now:
        job.run.record(NAMED, "", **{kind: str(folder.resolve()) for kind, folder in now.items()})


def teachers_of(job):
    """Return the folders that --pseudo and --teacher name, by kind. Raises InputError unless all are other runs.

    They must be runs of this solution in which no other process works.
    """
    found = {kind: folder for kind in KINDS if (folder := getattr(job.options, kind)) is not None}
    for kind, folder in found.items():
        with _open_teacher(job, kind, folder):
            pass
    return found


def _ask_teacher(job, kind, folder):
    """Let the run in `folder` predict for each fold, unless it has; return the record."""
    option = f"--{kind} {folder}"
    settings = _settings(job.options, kind)
    with _open_teacher(job, kind, folder) as teacher:
        if not teacher.is_blend:
            teacher.refuse_derived()
        predicted = require(teacher, teacher.steps["predict"])["key"]
        if kind == "teacher" and "x_min" not in read_parquet(teacher.run.path("oof.parquet")):
            del settings["confidence"]  # of boxes
        key = [predicted, settings, job.images.key, job.images.pixels_key]
        ranks = (teacher.run.step("blend") or {}).get("average") == "rank"
        check(not ranks, f"{option}: a blend of ranks, which are no probabilities")
        theirs, own = (each.images.about.get("classes") for each in (teacher, job))
        check(theirs == own, f"{option}: predicts other classes, {theirs} instead of {own}")
        make = partial(_predict_folds, kind, teacher, settings, key)
        step = Step(kind, make, (), lambda job: key, [f"fold{k}/{kind}/labels.parquet" for k in job.config.folds])
        if (job.run.step(kind) or {}).get("key") != digest(key_of(job, step)):
            refuse_trainings(job, f"without {option}, or before that changed")
        return run_step(job, step)


def _open_teacher(job, kind, folder):
    is_own = folder.resolve() == job.run.folder.resolve()
    check(not is_own, f"--{kind} {folder}: is the run itself; name a finished one")
    return open_run(job.recipe, type(job.config), folder, device=job.options.device, workers=job.options.workers)


def _settings(options, kind):
    """Return the values of a kind's own options, such as --pseudo-confidence and --pseudo-weight, by short name."""
    return {each.removeprefix(f"{kind}_"): getattr(options, each) for each in LESSONS if each.startswith(f"{kind}_")}


def _predict_folds(kind, teacher, settings, key, job):
    """Write fold<k>/<kind>: what the teacher's networks of each fold predict, and what that teaches; return facts."""
    counts = {}
    for fold in job.config.folds:
        place, make = f"fold{fold}/{kind}", partial(_predict_fold, kind, teacher, settings, fold)
        names = [f"{place}/{name}" for name in ("labels.parquet", *prediction_files(teacher, ["test"]))]
        counts[fold] = run_step(job, Step(place, make, (), lambda job: key, names))["images"]
    return {"run": str(teacher.run.folder.resolve()), "images": counts, **settings}


def _predict_fold(kind, teacher, settings, fold, job):
    others = [k for k in range(job.config.n_folds) if k != fold]
    ids = job.images.ids(job.images.rows("test", ok=True) if kind == "pseudo" else job.images.rows(folds=others))
    check(len(ids), f"--{kind}: this run has no readable test images; --test names some")
    with closing(Run(job.run.path(f"fold{fold}", kind))) as run:
        found = predict_by(teacher, job, fold, ids, run)
        labels = processes.ask_main(lambda: _write_labels(job, kind, settings, ids, found, run))
    log.info(f"fold {fold}: {labels:,} of {len(ids):,} images are labelled by {teacher.run.folder}")
    check(labels, f"--{kind}: no prediction for fold {fold} is confident enough; lower --{kind}-confidence")
    return {"images": labels}


def predict_by(teacher, job, fold, ids, run):
    """Write what a teacher's networks of one fold predict of images, as test images of `run`; return the Predicted.

    Of a blend, its members' predictions are mixed by the weights that were searched on the other folds. Raises
    InputError if the networks have seen an image that `job` holds out in this fold, or one of its patients.
    """
    recipe, target, members, tables = teacher.recipe, replace(teacher, run=run), [], {}
    target.__dict__["images"] = teacher.images
    if teacher.is_blend:
        mixing = mixing_of(teacher, str(fold))
        for (name, folder), key in zip(mixing["folders"].items(), mixing["keys"], strict=True):
            with open_run(recipe, type(teacher.config), folder, device=job.options.device) as member:
                same = require(member, member.steps["predict"])["key"] == key
                check(same, f"{folder}: has predicted anew since it was blended; run `blend` again")
                with closing(Run(run.path(f"member{len(members)}"))) as own:
                    found = predict_by(member, job, fold, ids, own)
                members.append(Member(name, member, {"test": found, "oof": None}, list(ids)))
    else:
        check_honest(teacher, job, fold, ids)
        rows = teacher.images.rows_of(ids)
        tables = recipe.predict(teacher, [fold], rows, run.maps("test", new=True), f"teacher, fold {fold}")

    def write():
        for suffix, table in tables.items():
            table = table if "fold" in table else table.assign(fold=fold)
            write_table(run.path(f"test{suffix}.parquet"), recipe.pool(suffix, [table]) if recipe.pool else table)
        if members:
            write_mixed(target, members, "test", mixing)

    processes.ask_main(write)
    return read_predictions(target, "test")


def check_honest(teacher, job, fold, ids):
    """Raise InputError if a teacher's networks of a fold have seen images or patients that `job` holds out in it.

    Or one of `ids`, if these are test images.
    """
    where = teacher.run.folder
    teacher.refuse_derived()
    check(fold in teacher.config.folds, f"{where}: has no networks that have not seen fold {fold} (its --folds)")
    mine, theirs = job.images.table, teacher.images.table
    held, further = mine[mine["fold"] == fold], theirs["split"] == FURTHER
    seen = theirs[further | ((theirs["fold"] >= 0) & (theirs["fold"] != fold))]
    tests = set(ids) & set(mine.loc[mine["split"] == "test", "image_id"])
    for name, own in (("image_id", tests | {*held["image_id"]}), ("patient_id", {*held["patient_id"]} - {""})):
        for each in sorted(own & set(seen[name]))[:1]:
            what = f"its networks of fold {fold} were trained on {each}, which this run holds out"
            remedy = f"give this run --fold-table {where / 'folds.csv'}"
            raise InputError(f"{where}: {what}; {remedy} (blends of runs with different folds cannot teach)")


def _write_labels(job, kind, settings, ids, found, run):
    """Write what the predictions of a fold teach and return the number of images.

    labels.parquet: image_id, position (of its map), and as probabilities the columns that images.parquet has of the
    solution's `soft_labels`. boxes.parquet, of a detector: the confident boxes; of a teacher of training images, those
    that the images lack. Pseudo-labels are only those that are confident in every column and channel, and whose boxes
    or mask, if there are columns too, say the same as these; up to a confidence of 0.5 all are.
    """
    labels, least = pd.DataFrame({"image_id": ids, "position": np.arange(len(ids))}), settings.get("confidence")
    soft = job.recipe.soft_labels(found)
    columns = [] if "x_min" in soft else [name for name in value_columns(soft) if name in job.images.table]
    labels = labels.merge(soft[["image_id", *columns]], on="image_id") if columns else labels
    if "x_min" in found.table:
        boxes = _confident_boxes(found.table, job.images, least, only_missing=kind == "teacher")
        write_table(run.path("boxes.parquet"), boxes)
        boxed = labels["image_id"].isin(boxes["image_id"]).to_numpy()
    if kind == "pseudo":
        values, shows = labels[columns].to_numpy(), None
        sure = ((values >= least) | (values <= 1 - least)).all(axis=1)
        if found.maps is not None:
            clear, shows = np.array([_read_mask(found.maps[at], least) for at in labels["position"]]).T
            sure &= clear
        elif "x_min" in found.table:
            shows = boxed
            sure &= shows | (len(columns) > 0)
        if columns and shows is not None and least > 0.5:
            sure &= (values >= 0.5).any(axis=1) == shows
        labels = labels[sure]
    elif "x_min" in found.table and not columns:
        labels = labels[boxed]
    write_table(run.path("labels.parquet"), labels)
    return len(labels)


def _confident_boxes(table, images, least, only_missing):
    """Return a teacher's boxes with a fused score of at least `least`.

    only_missing: only those on images with true boxes, none of which is of the same class and overlaps by IOU.
    """
    fused = [table[:0]]
    for _, boxes in table.groupby("class_id"):  # specialists would lower the scores of classes they do not vote on
        names = boxes["member"].unique().tolist()
        fused += mixed_boxes(boxes, images.table, names, IOU, [(1,) * len(names)])
    boxes = pd.concat(fused, ignore_index=True)
    boxes = boxes[boxes["score"] >= least]
    if not only_missing:
        return boxes
    true, missing = images.tables["boxes.parquet"], []
    true = true.assign(image_id=images.ids(true["row"])).groupby("image_id")
    for name, of_image in boxes.groupby("image_id"):
        if name in true.indices:
            known = true.get_group(name)
            same = of_image["class_id"].to_numpy()[:, None] == known["class_id"].to_numpy()
            missing.append(of_image[~((iou_matrix(of_image[BOX], known[BOX]) >= IOU) & same).any(axis=1)])
    return pd.concat([boxes[:0], *missing])


def _read_mask(probs, least):
    """Return whether a map, uint8 (…, h, w), is confident in each channel, and whether it shows anything above 0.5.

    Confident are pixels above 0.5 with a mean of at least `least`, and where there are none, all at most 1 − least.
    """
    parts = [(each, each >= 128) for each in probs.reshape(-1, *probs.shape[-2:])]
    clear = [e[m].mean() >= 255 * least if m.any() else e.max() <= 255 * (1 - least) for e, m in parts]
    return all(clear), any(m.any() for _, m in parts)


def teach(job, network, held_out):
    """Return a Job whose images have what a Network learns from teachers, further store rows to train on, and a key.

    The key is None without teachers. Test images with a held-out patient, or with the pixels of a held-out image, are
    left out.
    """
    fold, further = network.fold, np.zeros(0, int)
    if not job.lessons or fold not in job.config.folds:
        return job, further, None
    images = replace(job.images, table=job.images.table.copy(), tables=dict(job.images.tables), taught={})
    pupil = replace(job)
    pupil.__dict__["images"] = images
    for kind, record in job.lessons.items():
        labels, boxes = _read_lesson(job, kind, record, fold)
        there = labels["image_id"].isin(images.table["image_id"]).all()
        what = "its networks learned from test images that it no longer has; to predict others, "
        check(there, f"{job.run.folder}: {what}run `predict`, `tune` and `submit`, or export and infer")
        own, share = images.rows_of(labels["image_id"]), record.get("share", 1.0)
        if kind == "pseudo":
            held_rows = np.union1d(images.rows(folds=[fold]), held_out) if fold < job.config.n_folds else further
            copies = images.are_copies(own, held_rows)
            further, labels, own = own[~copies], labels[~copies], own[~copies]
        _mix(images, own, labels.drop(columns=["image_id", "position", "maps"]), share)
        maps = labels["maps"] if job.recipe.maps else [None] * len(own)
        places = zip(own.tolist(), maps, labels["position"], strict=True)
        images.taught.update({row: (path, position, share) for row, path, position in places})
        if boxes is not None:
            _add_boxes(images, own, boxes)
    if "pseudo" in job.lessons:
        record = job.lessons["pseudo"]
        further = network.taught(pupil, further) if network.taught else further[:0]
        further = np.random.default_rng([job.config.seed, fold]).permutation(further)
        further = np.resize(further, round(record["weight"] * len(further)))
        text = f"fold{fold}/{network.stage}: {len(further):,} samples with labels of {record['run']}"
        log.info(f"{text}; {copies.sum()} copies or patients of held-out images left out")
    return pupil, further, [[kind, record["key"], further.tolist()] for kind, record in job.lessons.items()]


def _read_lesson(job, kind, record, fold):
    """Return what a fold learns from a teacher: its labels, with the file of the maps, and boxes or None.

    A refit, whose record names the `folder` of the run that it comes from, learns what the folds did: for each image,
    what one of them, drawn at random, was taught.
    """
    folder, folds = (record["folder"], record["images"]) if "folder" in record else (job.run.folder, [fold])
    paths = [Path(folder, f"fold{each}", kind) for each in folds]
    labels = [read_parquet(path / "labels.parquet").assign(maps=str(path / "test_probs.b2nd")) for path in paths]
    labels = pd.concat(labels, ignore_index=True).sample(frac=1, random_state=job.config.seed)
    labels = labels.drop_duplicates("image_id").sort_index().reset_index(drop=True)
    if not (paths[0] / "boxes.parquet").is_file():
        return labels, None
    boxes = [read_parquet(path / "boxes.parquet").assign(maps=str(path / "test_probs.b2nd")) for path in paths]
    return labels, pd.concat(boxes, ignore_index=True).merge(labels[["image_id", "maps"]])


def _mix(images, rows, labels, share):
    """Move the labels of store rows by `share` towards a teacher's; unknown ones, NaN or negative, stay so."""
    places = pd.Index(images.table["row"]).get_indexer(rows)
    for name in labels:
        values, soft = images.table[name].to_numpy(float, copy=True), labels[name].to_numpy()
        before = values[places]
        mixed = np.where(before >= 0, (1 - share) * before + share * soft, before)
        values[places] = soft if share == 1 else mixed
        images.table[name] = values
    images.__post_init__()  # look-ups by row see them too


def _add_boxes(images, rows, boxes):
    """Add a teacher's boxes on store rows to those of the images."""
    known = images.tables["boxes.parquet"]
    boxes = boxes.assign(row=boxes["image_id"].map(dict(zip(images.ids(rows), rows, strict=True)))).dropna(subset="row")
    boxes = boxes[[name for name in known if name in boxes]].astype({"row": int})
    images.tables["boxes.parquet"] = pd.concat([known, boxes], ignore_index=True)


def read_lessons(run, **more):
    """Return the records of what a Run or, of a refit, its source has learned from teachers, by kind, with `more`."""
    refit = (run.step("refit") or {}).get("lessons", {})
    return {kind: record | more for kind in KINDS if (record := run.step(kind) or refit.get(kind))}


def describe_lessons(run):
    """Return what the networks of a Run have learned from teachers, JSON by kind, without paths."""
    kept = ("confidence", "weight", "share", "images")
    return {
        kind: {"run": Path(record["run"]).name, **{name: record[name] for name in kept if name in record}}
        for kind, record in read_lessons(run).items()
    }
