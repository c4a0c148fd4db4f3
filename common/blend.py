"""The tool `blend` of every solution: the predictions of finished runs become one run.

The out-of-fold predictions of each fold are mixed by weights that were searched on the other folds, those of the test
images by weights searched on all; rule, score, submission and page follow as in any run.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from common.data.tables import match_names, path_without_suffix
from common.errors import InputError, check, log
from common.infer import mixing
from common.job import derive_run, open_run
from common.paths import write_csv, write_table
from common.post.boxes import unpack_boxes
from common.predictions import Predicted, check_same_images, predicting_networks, read_predictions
from common.runs import start_log
from common.step import file_stamp, require, run_step
from common.tuning import halve

OWN = ["row", "fold", "ok", "area", "patient_id"]  # columns of the image table that may differ between runs
IOU = 0.5  # overlap above which boxes are fused, where the first run's configuration has none
SEARCHED = 500  # images at most on whose maps weights are searched


@dataclass(frozen=True, eq=False)
class Member:
    """A run that takes part: its Job, its Predicted as {"oof": …, "test": …}, and the ids of the out-of-fold images.

    A file takes part with the Job of the first run; without predictions of the training images, its "oof" is None.
    """

    name: str
    job: Any
    predicted: dict
    ids: list
    file: Path | None = None

    def places(self, part, ids, suffix=""):
        """Return the positions of images in a table of predictions. Raises InputError for one that is missing."""
        found = pd.Index(self.predicted[part].tables[suffix]["image_id"]).get_indexer(ids)
        for missing in np.flatnonzero(found < 0)[:1]:
            raise InputError(f"{self.job.run.folder}: has no prediction of {ids[missing]}")
        return found

    def values(self, part, ids, average, suffix=""):
        """Return a table of predictions in the order of `ids`, as ranks if these are averaged."""
        table = self.predicted[part].tables[suffix].iloc[self.places(part, ids, suffix)].reset_index(drop=True)
        known = self.predicted["oof"] or self.predicted[part]
        return table if average == "probability" else mixing.to_ranks(table, known.tables[suffix])


def blend_tool(recipe, config_class, read):
    """Return the tool `blend` of a solution; read(path) -> anyone's predictions, see common.compare.Comparison."""

    def blend(
        runs: tuple[Path, ...],
        /,
        *,
        out: Path,
        average: Literal["probability", "rank"] = "probability",
        iou: float | None = None,
        share: float = 0.5,
        weights: tuple[float, ...] = (),
    ):
        """Blend the predictions of finished runs into a run with a score, a submission and a page of its own.

        The runs must have predicted the same images; networks, sizes, seeds and folds may differ. Images, labels, folds
        and settings of the decision are those of the first run. Weights are searched by forward selection on
        out-of-fold predictions, for each fold on the others.

        Args:
            runs: Folders of runs, and after the first one also files of anyone's predictions of the test images, such
                as a submission, or folders of masks; what has the training images too must have them out of fold.
                Boxes are fused, and each detector of a run counts as a member.
            out: Folder of the blend.
            average: Of probabilities, or of their ranks among the run's out-of-fold ones.
            iou: Boxes with a larger overlap are fused; by default the first of the first run's `fusion.iou`, or 0.5.
            share: Of the submission that goes to files without training images, whose weights cannot be searched.
            weights: One per run or file, in their order, instead of a search.
        """
        fits = len(weights) in (0, len(runs)) and all(0 <= each < math.inf for each in weights) and 0 not in weights[:1]
        check(fits, f"--weights {' '.join(map(str, weights))}: needs one per run, none negative, the first above 0")
        check(0 < share < 1, f"--share {share}: must lie between 0 and 1")
        if len({folder.resolve() for folder in (*runs, out)}) < max(3, len(runs) + 1) or not 0 <= (iou or 0) <= 1:
            raise InputError("a blend takes two or more different runs, another --out, and an --iou in [0, 1]")
        members = []
        for folder in runs:
            masks = recipe.maps and folder.is_dir() and not (folder / "config.json").is_file()
            if members and (folder.is_file() or masks):
                theirs = read_file(folder, members[0], read)
                is_taken = theirs.name in [each.name for each in members]
                members.append(replace(theirs, name=str(folder.resolve())) if is_taken else theirs)
            else:
                members.append(read_run(folder, recipe, config_class, [each.name for each in members]))
                check_same(members[0], members[-1])
        check_folds([member for member in members if member.file is None])
        if average == "rank" and (recipe.maps or "x_min" in members[0].predicted["oof"].table):
            raise InputError("--average rank: only probabilities of images have ranks, not boxes or masks")
        first = members[0].job
        iou = overlap_of(first.config) if iou is None else iou
        keys = [file_stamp(each.file) if each.file else each.job.run.step("predict")["key"] for each in members]
        settings = {"average": average, "iou": iou, "share": share, "predictions": keys, "weights": weights}
        settings["members"] = {each.name: str((each.file or each.job.run.folder).resolve()) for each in members}
        manifests = [each.file or each.job.run.path("manifest.json") for each in members]
        manifests = [path for path in manifests if path.is_file()]
        config = with_one_detector(first.config)
        derive_run(first, out, config, "blend", [average, iou, share, keys, *weights], manifests, **settings)
        with open_run(recipe, config_class, out, device="cpu") as job:
            start_log(job.run.path("log.txt"))
            run_step(job, replace(job.steps["predict"], make=partial(_predict, members, settings)))
            for verb in ("tune", "score", "submit", "report"):
                recipe.verbs()[verb](job)
        return 0

    return blend


def overlap_of(config):
    """Return the overlap above which boxes are fused: the first that a configuration's `fusion` tries, else IOU."""
    return getattr(getattr(config, "fusion", None), "iou", (IOU,))[0]  # a `fusion` that is a network has none


def with_one_detector(config):
    """Return a configuration whose fused boxes are those of one detector, of all classes even if it was a specialist's.

    A specialist is named `class=member`, see solutions.vinbigdata; its figures are those of its classes alone.
    """
    members = getattr(config, "members", ())
    return replace(config, members=(members[0].rpartition("=")[2],)) if members else config


def read_run(folder, recipe, config_class, taken):
    """Return the Member of a finished run, named by its whole path if its folder's name is among `taken`.

    Raises InputError if its predictions are not current, or if it is a refit, which has none out of fold.
    """
    with open_run(recipe, config_class, folder, device="cpu") as job:
        if job.run.step("refit") is not None:
            raise InputError(f"{folder}: trained on all images, none of them out of fold; use its original run")
        require(job, job.steps["predict"])
        predicted = {part: read_predictions(job, part) for part in ("oof", "test")}
        ids = predicted["oof"].table["image_id"]
        if "x_min" in predicted["oof"].table:  # the table has no row for an image without boxes
            ids = job.images.ids(np.concatenate([job.images.rows(folds=[fold]) for fold in job.config.folds]))
    name = folder.resolve().name
    return Member(str(folder) if name in taken else name, job, predicted, list(ids))


def read_file(path, first, read):
    """Return the Member of a file of anyone's predictions, for a blend with the Member `first`.

    Raises InputError if it lacks a test image, a class, or some of the training images but not all.
    """
    table, tests = read(path), first.job.images.ids(first.job.images.rows("test"))
    by_path = {path_without_suffix(image_id): image_id for image_id in (*tests, *first.ids)}
    table = table.set_axis(match_names(table.index, pd.Index(by_path)).map(lambda name: by_path.get(name, name)))
    predicted = {"oof": None}
    for part, ids in (("test", tests), ("oof", first.ids)):
        missing = [image_id for image_id in ids if image_id not in table.index]
        if part == "test" or len(missing) < len(ids):
            found = f"{path}: has no prediction of {len(missing):,} {part} images"
            check(not missing, f"{found}, such as {missing[0] if missing else ''}")
            predicted[part] = _as_predicted(path, table.loc[ids].reset_index(), first.predicted[part], ids)
    return Member(str(path), first.job, predicted, first.ids, path)


def _as_predicted(path, table, like, ids):
    """Return a table of anyone's predictions of images in the form of the Predicted `like`."""
    if "found" in table:
        found = unpack_boxes(table["found"], ids).assign(member="boxes", fold=-1)
        found = found[found["class_id"].isin(like.table["class_id"].unique())]  # not a class of images without any
        return Predicted(found, {"": found})
    columns = mixing.value_columns(like.table)
    maps = None
    if like.maps is not None:
        check(like.maps.ndim == 3, f"{path}: one mask per image, but the runs predict several")
        maps = mixing.DrawnMaps(table.get("read", table.get("runs")).tolist(), like.maps.shape)
        shows = np.array([maps[position].any() for position in range(len(ids))], float)
        table = pd.DataFrame({name: shows for name in columns})  # of SIIM, the presence
    for missing in [name for name in columns if name not in table][:1]:
        raise InputError(f"{path}: has no {missing}, which the runs predict")
    found = like.table.set_index("image_id").loc[ids].reset_index()
    found = found.assign(**{name: table[name] for name in columns})
    return Predicted(found, {"": found}, maps)


def check_same(first, other):
    """Raise InputError unless two Members predicted the same images, with the same labels and classes."""
    mine, where = first.job.run.folder, other.job.run.folder
    tests = [each.job.images.ids(each.job.images.rows("test")) for each in (first, other)]
    for kind, one, two in (("training images", first.ids, other.ids), ("test images", *tests)):
        check_same_images(where, two, mine, one, "a blend needs the same images", kind)
    forms, wanted = [], list(first.predicted["oof"].tables)
    for each in (first, other):
        oof, classes = each.predicted["oof"], each.job.images.about.get("classes")
        shape = getattr(oof.maps, "shape", ())[1:-2]
        forms.append([each.job.recipe.metric, classes, shape, [name for name in wanted if name in oof.tables]])
    check(forms[0] == forms[1], f"{where}: predicts something else than {mine}: {forms[1]}, not {forms[0]}")
    tables = [each.job.images.table.set_index("image_id").loc[[*first.ids, *tests[0]]] for each in (first, other)]
    for column in tables[0].columns.intersection(tables[1].columns).difference(OWN):
        one, two = (table[column].astype(str).fillna("") for table in tables)
        if (one != two).any():
            found = f"prepared with another {column} of {(one != two).idxmax()} than {mine}"
            raise InputError(f"{where}: {found}; a blend needs the same data and labels")


def check_folds(members):
    """Raise InputError if a prediction comes from a network that was trained on another image of the same patient.

    A patient that one of the runs knows counts for all of them.
    """
    known = pd.concat([each.job.images.table.set_index("image_id")["patient_id"] for each in members])
    known = known[known != ""].groupby(level=0).first()
    for member in members:
        table = member.job.images.table.query("fold >= 0")
        folds = table["fold"].groupby(table["image_id"].map(known)).unique()
        for patient, found in folds[folds.map(len) > 1].sort_index()[:1].items():
            saw = f"networks saw patients whose images they predict: {patient} is in the folds {sorted(found.tolist())}"
            remedy = "train it with the --fold-table of a run that knows the patients"
            raise InputError(f"{member.job.run.folder}: {saw}; {remedy}")


def _predict(members, settings, job):
    """Search the weights and write the predictions of the blend and blend.csv; return facts for the manifest."""
    searched = [member for member in members if member.predicted["oof"] is not None]
    fixed = [member for member in members if member.predicted["oof"] is None]
    ids, images = np.array(searched[0].ids), job.images
    parts = images.at(images.rows_of(ids))["fold"].to_numpy()
    if len(np.unique(parts)) < 2:
        parts = halve(images.groups(images.rows_of(ids)), len(ids), job.config.seed)
    mixture, names, used = _make_mixture(searched, settings, job)
    given = dict(zip([each.name for each in members], settings["weights"], strict=False))
    weights = _choose_weights(mixture, names, parts[used], searched, given)
    score, table = mixing.compare_members(mixture, weights, parts[used], names)
    by_part = {str(part): each for part, each in weights.items()}
    mixed = settings | {"names": names, "runs": [each.name for each in searched], "weights": by_part}
    write_mixed(job, searched, "oof", mixed, dict(zip(ids.tolist(), parts.tolist(), strict=True)))
    if fixed:
        of_fixed = [each.name + ": boxes" * ("x_min" in each.predicted["test"].table) for each in fixed]
        by_part["None"], share = _add_fixed(weights[None], [given.get(each.name) for each in fixed], settings["share"])
        mixed |= {"names": [*names, *of_fixed], "runs": [*mixed["runs"], *(each.name for each in fixed)]}
        table = pd.concat([table, pd.DataFrame({"member": of_fixed})], ignore_index=True)
        table["weight"] = by_part["None"]
        log.info(f"the score is without {', '.join(of_fixed)}, given {share:g} of the submission")
    write_mixed(job, [*searched, *fixed], "test", mixed | {"weights": {"None": by_part["None"]}})
    write_csv(job.run.path("blend.csv"), table)
    log.info(f"{job.recipe.metric} out of fold {score:.4f}; members alone and what leaving them out costs:")
    log.info(table.to_string(index=False, float_format="%.4f".__mod__))
    return {"images": len(ids), "score": score, "names": mixed["names"], "weights": by_part}


def _make_mixture(members, settings, job):
    """Return the Mixture of the Members' out-of-fold predictions, the names of what it mixes, and which images it uses.

    Boxes are mixed by detector, everything else by run. Of maps, at most SEARCHED images are used.
    """
    ids, images, networks = np.array(members[0].ids), job.images, predicting_networks(job)
    rows, names, network, used = images.rows_of(ids), [each.name for each in members], networks[-1], np.arange(len(ids))
    if (boxes := boxes_of(members, "oof")) is not None:
        network, names = networks[0], boxes["member"].unique().tolist()
        mixed = partial(mixing.mixed_boxes, boxes, images.table, names, settings["iou"])
    elif job.recipe.maps:
        used = np.sort(np.random.default_rng(job.config.seed).permutation(len(ids))[:SEARCHED])
        dataset, maps = network.dataset(job, rows[used], False, True), _maps(members, "oof", ids[used])
        mixed = partial(mixing.mixed_values, network, partial(mixing.target_blocks, dataset, *maps))
    else:
        tables = [each.values("oof", ids, settings["average"]) for each in members]
        values = np.stack([table[mixing.value_columns(table)].to_numpy(float) for table in tables])
        mixed = partial(mixing.mixed_values, network, lambda: [(values, None)])
    return mixing.Mixture(job, network, rows[used], mixed), names, used


def _choose_weights(mixture, names, parts, members, given):
    """Return {part: weights}, under None those for the test images; given: weights by Member, or {} to search them."""
    owners = _owners(names, [each.name for each in members])
    if given:  # a run's detectors share its weight
        own = tuple(given[name] / owners.count(name) for name in owners)
        return dict.fromkeys([*np.unique(parts).tolist(), None], own)
    alone = [tuple(int(owner == each.name) for owner in owners) for each in members]
    return mixing.search_weights(mixture, parts, len(names), also=[*alone, (1,) * len(names)])


def _add_fixed(searched, given, share):
    """Return the weights of all members, which sum to 1, and the share of those without out-of-fold predictions.

    searched: weights of the others; given: --weights of these members, None each to let them have `share` together.
    """
    if None in given:
        given = [share / (1 - share) * sum(searched) / len(given)] * len(given)
    weights = np.array([*searched, *given]) / (sum(searched) + sum(given))
    return weights.tolist(), weights[len(searched) :].sum()


def mixing_of(job, part="None"):
    """Return how a blend mixes the test images, for `write_mixed`, without members of no weight.

    folders: of the runs, by name; keys: of their predictions. part: a fold, whose weights were searched on the others.
    """
    record, predicted = job.run.step("blend"), job.run.step("predict")
    for name, place in record["members"].items():
        here = Path(place, "config.json").is_file()
        check(here, f"{name}: predictions of networks that are not here, so it cannot predict others")
    check("names" in predicted, f"{job.run.folder}: blended by an earlier version; run `blend` again")
    alone = part != "None" and len(job.config.folds) < 2
    check(not alone, f"{job.run.folder}: a blend of one fold, whose weights follow from all labels of it")
    used = [(name, w) for name, w in zip(predicted["names"], predicted["weights"][part], strict=True) if w]
    names, weights = zip(*used, strict=True)
    runs = [name for name in record["members"] if name in _owners(names, record["members"])]
    keys = dict(zip(record["members"], record["predictions"], strict=True))
    found = {"average": record["average"], "iou": record["iou"], "runs": runs, "names": names}
    found |= {"folders": {name: record["members"][name] for name in runs}, "keys": [keys[name] for name in runs]}
    return found | {"weights": {"None": weights}}


def write_mixed(job, members, part, mixing, part_of=None):
    """Write the predictions `part`, "oof" or "test", of the Members as those of `job`.

    mixing: average, iou; names: of what is mixed, runs or their detectors; runs: names of the Members; weights: by the
    part of an image, which part_of gives, those of test images under "None".
    """
    weights = {None if each == "None" else each: tuple(found) for each, found in mixing["weights"].items()}
    part_of = {} if part == "test" else {image_id: str(each) for image_id, each in part_of.items()}
    owners = [mixing["runs"].index(name) for name in _owners(mixing["names"], mixing["runs"])]
    of_runs = {each: np.bincount(owners, found, len(members)) for each, found in weights.items()}
    for suffix in job.recipe.suffixes(job.config):
        boxes = None if suffix else boxes_of(members, part)
        if boxes is not None:
            _write_boxes(job, part, boxes, mixing["names"], weights, part_of, mixing["iou"])
        else:
            _write_table(job, members, part, suffix, of_runs, part_of, mixing["average"])


def boxes_of(members, part):
    """Return the boxes of all Members' detectors as one table, None if they predict none."""
    if "x_min" not in members[0].predicted[part].table:
        return None
    tables = {each.name: each.predicted[part].table for each in members}
    tables = [table.assign(member=f"{name}: " + table["member"]) for name, table in tables.items()]
    return pd.concat(tables, ignore_index=True)


def _owners(names, runs):
    """Return the runs of `names`, of which those of detectors are `run: detector`."""
    return [name if name in runs else name.rsplit(": ", 1)[0] for name in names]


def _maps(members, part, ids):
    return [each.predicted[part].maps for each in members], np.stack([each.places(part, ids) for each in members])


def _write_table(job, members, part, suffix, weights, part_of, average):
    """Write a table of mixed probabilities, and with the main table the mixed maps."""
    ids = members[0].predicted[part].tables[suffix]["image_id"].to_numpy()
    having = [k for k, each in enumerate(members) if suffix in each.predicted[part].tables]  # files have the main one
    members = [members[k] for k in having]
    weights = {key: found[having] if found[having].any() else np.ones(len(having)) for key, found in weights.items()}
    shares = mixing.shares_of(weights, [part_of[each] if part == "oof" else None for each in ids])
    table = mixing.mix_tables([each.values(part, ids, average, suffix) for each in members], shares)
    write_table(job.run.path(f"{part}{suffix}.parquet"), table)
    if job.recipe.maps:
        mixing.mix_maps(job.run.maps(part, new=True), *_maps(members, part, ids), shares)


def _write_boxes(job, part, table, names, weights, part_of, iou):
    """Write the table of fused boxes as those of one detector, each out-of-fold image under its part's weights."""
    images, fused = job.images.table, []
    parts = table["image_id"].map(part_of if part == "oof" else {})
    for chosen, own in table.groupby(parts, dropna=False):
        fused += mixing.mixed_boxes(own, images, names, iou, [weights[chosen if part == "oof" else None]])
    table = pd.concat(fused, ignore_index=True)
    folds, stage = images.set_index("image_id")["fold"], predicting_networks(job)[0].stage
    write_table(job.run.path(f"{part}.parquet"), table.assign(member=stage, fold=table["image_id"].map(folds)))
