"""What a run has learnt, as one flat folder that predicts new images without the run: the tools `export` and `infer`.

A trained folder holds `fold<k>-<stage>.safetensors`, whatever other weights the solution needs, and trained.json:
format, solution, preset, config (as in config.json), git and packages (of the run), score (metric, estimate, low, high),
files (name to SHA-256), neutral (what an unreadable image gets) and rule (what `tune` wrote).
"""

import logging
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.cli import Context, Options
from common.config import file_hash, from_dict, to_dict
from common.data.store import prepare_store
from common.data.tables import named_images, read_ids
from common.errors import InputError
from common.paths import atomic_path, check_id, competition_folder, find_images, read_json, write_json
from common.runs import Run
from common.steps import store_folder
from common.train import distributed
from common.train.loop import Budget

log = logging.getLogger(__name__)
FORMAT = 1
ABOUT = "trained.json"
WORKING = Path("/kaggle/working")
_FIELDS = {"solution": str, "preset": str, "config": dict, "files": dict, "rule": dict}


@dataclass(frozen=True)
class Learnt:
    """What a solution hands over of a finished run.

    weights: paths `fold<k>/<stage>/final.safetensors` in the run. others: further files by their name in the folder.
    rule: the content of tuned.json. metric, score: the headline's name and its dict of estimate, low and high in
    score.json. neutral: what an image that cannot be read gets, as JSON.
    """

    weights: list
    rule: dict
    metric: str
    score: dict
    neutral: Any
    others: dict


def write_trained(context, learnt, out):
    """Write the trained folder `out` of a run and return it; an earlier one there is replaced.

    Raises InputError where `out` is a file, or a folder of something else.
    """
    out, run = Path(out), context.run
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise InputError(f"--out {out}: holds other files; name an empty or a new folder")
    for name in _earlier(out):
        (out / name).unlink(missing_ok=True)
    (out / ABOUT).unlink(missing_ok=True)  # a folder without it is not taken for whole
    named = {f"{path.parent.parent.name}-{path.parent.name}.safetensors": path for path in learnt.weights}
    files = {}
    for name, path in {**named, **learnt.others}.items():
        with atomic_path(out / name) as temporary:
            shutil.copyfile(path, temporary)
        files[name] = file_hash(out / name)
    manifest = run.manifest
    write_json(out / ABOUT, {
        "format": FORMAT, "solution": context.solution, "preset": context.preset, "config": to_dict(context.config),
        "git": manifest.get("git", ""), "packages": manifest.get("packages", {}),
        "score": {"metric": learnt.metric, **learnt.score}, "files": files, "neutral": learnt.neutral,
        "rule": learnt.rule,
    })  # fmt: skip
    return out


def _earlier(out):
    """Names of the files of the trained folder that `out` already is; none where its trained.json is damaged."""
    try:
        return list(_read(out)["files"])
    except InputError:
        return []


def _read(folder):
    """The content of trained.json, its types checked and its files' names plain."""
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise InputError(f"{folder}: not a trained folder (no {ABOUT}); the tool `export` writes one")
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise InputError(f"{path}: not of format {FORMAT}, which this program reads, but {found!r}")
    for name, kind in _FIELDS.items():
        if not isinstance(about.get(name), kind):
            raise InputError(f"{path}: no {name}, or not what `export` writes there")
    for name in about["files"]:
        check_id(name, f"{path}: files")
    return about


@dataclass(frozen=True)
class Trained:
    """A trained folder whose files are those that were exported.

    config: a dict, for `common.config.from_dict`. rule, neutral: as in `Learnt`. files: names of the files.
    """

    folder: Path
    solution: str
    preset: str
    config: dict
    rule: dict
    neutral: Any
    files: tuple[str, ...]

    @classmethod
    def open(cls, folder, solution=None):
        """Open a trained folder, of this solution where one is named, and check the hashes of all its files.

        Raises InputError naming the folder or file: no trained folder, another solution's, a file missing or changed.
        """
        folder = Path(folder)
        about = _read(folder)
        if solution is not None and about["solution"] != solution:
            raise InputError(f"{folder}: what {about['solution']} has learnt, not {solution}")
        for name, sha256 in about["files"].items():
            path = folder / name
            if not path.is_file():
                raise InputError(f"{path}: missing; copy the trained folder again")
            if file_hash(path) != sha256:
                raise InputError(f"{path}: not the file that was exported (its SHA-256 differs); copy it again")
        parts = (about[name] for name in ("solution", "preset", "config", "rule"))
        return cls(folder, *parts, about.get("neutral"), tuple(about["files"]))

    @property
    def about(self):
        """Path of trained.json."""
        return self.folder / ABOUT

    def path(self, name):
        """Path of one of the files; InputError for a file that was not exported."""
        if name not in self.files:
            raise InputError(f"{self.about}: has no file {name}; export the run again")
        return self.folder / name

    def weights(self, fold, stage):
        """Path of the weights of one fold and stage; InputError where they were not exported."""
        return self.path(f"fold{fold}-{stage}.safetensors")

    def link(self, run):
        """Make links to the weights in the folder of a Run, at the places where trainings leave them."""
        for name in self.files:
            found = re.fullmatch(r"(fold\d+)-(.+)\.safetensors", name)
            if found:
                place = run.path(*found.groups(), "final.safetensors")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.unlink(missing_ok=True)
                place.symlink_to((self.folder / name).resolve())


# ---- test images ---------------------------------------------------------------------------------------------------


def find_test(options, source, columns):
    """Folder, ids in order and files (id → path) of the images to predict, without any label table.

    They are those of --test (a folder, or a CSV of names in the folder --data), else those of the sample submission in
    the competition's folder. source: the solution's common.kaggle.Source; columns: the sample submission's. Raises
    InputError where there is no sample submission, and for images without a file.
    """
    if options.test is not None:
        ids, files = named_images(options.test)
        if files:
            return options.test, ids, files
        folder = options.data or sample_submission(None, source).parent
    else:
        sample = sample_submission(options.data, source)
        folder, ids = sample.parent, read_ids(sample, columns)
        log.info(f"test images from {sample}")
    return folder, ids, files_of(ids, find_images(folder))


def files_of(ids, found):
    """The files of these images; InputError where one has none."""
    absent = [image_id for image_id in ids if image_id not in found]
    if absent:
        raise InputError(f"{len(absent)} test images have no file, the first is {absent[0]}")
    return {image_id: found[image_id] for image_id in ids}


def sample_submission(data, source):
    """Path of the sample submission in the folder that the user named, or, without, where Kaggle mounts it."""
    problem = None
    for name in source.samples:
        try:
            return competition_folder(data, source.slugs[0].split("/")[-1], name) / name
        except InputError as error:
            problem = problem or error
    raise problem


def test_store(context, folder, files):
    """Decode the test images `files` (id → path) into their store and return it."""
    options = context.options
    return prepare_store(
        files, store_folder(context, folder, files, context.config.store_size), context.config.store_size,
        workers=None if options.workers is None else max(options.workers, 1), on_bad_image=options.on_bad_image,
        placeholder_ids=frozenset(files),
    )  # fmt: skip


# ---- tools ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened_run(solution, config_class, folder, **options):
    """The Context of the run in `folder`, with the configuration that it was made with, and these Options.

    Raises InputError where the folder is not the run of this solution, and where another process works in it.
    """
    stored = Path(folder) / "config.json"
    if not stored.is_file():
        raise InputError(f"{folder}: not the folder of a finished run (no config.json)")
    values = read_json(stored)
    if not isinstance(values, dict) or values.pop("solution", None) != solution:
        raise InputError(f"{stored}: not the configuration of a run of {solution}")
    preset = values.pop("preset", "stored")
    config = from_dict(config_class, values, str(stored))
    with _context(solution, preset, config, Options(out=folder, **options)) as context:
        yield context


@contextmanager
def _context(solution, preset, config, options):
    device, run = distributed.start(options.device), Run(options.out)
    try:
        yield Context(solution, preset, config, options, run, device, Budget(None))
    finally:
        run.close()


def export_tool(solution, config_class, learnt):
    """The tool `export` of a solution; learnt(context) gives the Learnt of a finished run, or refuses it."""

    def export(run: Path, /, *, out: Path):
        """Write what a finished run has learnt as one flat folder, from which the tool `infer` predicts new images.

        It holds weights, configuration, decision rule and their hashes; the run and its images are not needed again.

        Args:
            run: Folder of the run.
            out: Folder for the files.
        """
        with opened_run(solution, config_class, run) as context:
            write_trained(context, learnt(context), out)
        files = [path for path in sorted(out.iterdir()) if path.suffix == ".safetensors"]
        log.info(f"{out}: {len(files)} files of weights, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
        return 0

    return export


def infer_tool(solution, config_class, prepare, answer, takes_sizes=False):
    """The tool `infer` of a solution.

    prepare(context, trained) decodes the test images and returns a Prepared with a `store`; answer(context, data,
    trained, out) predicts them, writes the submission and returns its Summary.
    """

    def infer(
        trained: Path,
        /,
        *,
        data: Path | None = None,
        test: Path | None = None,
        out: Path | None = None,
        work: Path | None = None,
        sizes: tuple[Path, ...] = (),
        on_bad_image: Literal["error", "placeholder"] = "error",
        device: str = "auto",
        workers: int | None = None,
    ):
        """Predict test images by what a run has learnt and write a submission; no labels and no run are needed.

        Args:
            trained: Folder that the tool `export` wrote.
            data: The competition's folder, whose sample submission names the images; on Kaggle found by itself.
            test: Images to predict instead: a folder, or a CSV whose first column names them.
            out: The submission (default: submission.csv, on Kaggle in /kaggle/working).
            work: Folder for decoded images and predictions, from which a call that was cut off goes on; by default a
                temporary one that is deleted at the end.
            sizes: CSV files with width and height of the originals, where images are resized copies (VinBigData).
            on_bad_image: placeholder: an image that cannot be read gets the neutral prediction.
            device: auto, cpu, cuda or cuda:<n>.
            workers: Processes that read images (default: one a core).
        """
        if sizes and not takes_sizes:
            raise InputError(f"--sizes: {solution} has no use for them")
        found = Trained.open(trained, solution)
        config = from_dict(config_class, found.config, str(found.about))
        out = out or (WORKING if WORKING.is_dir() else Path()) / "submission.csv"
        if out.is_dir():
            raise InputError(f"--out {out}: a folder; name the submission's file")
        with _work(work) as folder:
            options = Options(
                data=data, out=folder, store=folder / "stores", test=test, sizes=sizes, on_bad_image=on_bad_image,
                device=device, workers=workers,
            )  # fmt: skip
            with _context(solution, found.preset, config, options) as context:
                prepared = prepare(context, found)
                found.link(context.run)
                log.info(f"valid submission: {answer(context, prepared, found, out)}")
        return int((~prepared.store.table["ok"]).sum())

    return infer


@contextmanager
def _work(folder):
    """The folder to work in: the user's, which must not be a run, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="infer-") as temporary:
            yield Path(temporary)
        return
    if (folder / "config.json").exists() or (folder / ABOUT).exists():
        raise InputError(f"--work {folder}: is a run or a trained folder; name another")
    yield folder
