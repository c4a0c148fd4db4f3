"""`export` and `infer` of every solution: a finished run becomes a folder, the folder predicts a submission."""

import logging
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from common.budget import Budget
from common.config import file_hash, from_dict, to_dict
from common.errors import InputError
from common.images import prepare_test
from common.job import Job
from common.options import Options
from common.paths import atomic_path, read_json, remove_leftovers, write_json
from common.recipe import predict_test, predicting_networks, read_rule, read_score, write_answer
from common.runs import Run
from common.train import distributed
from common.trained import ABOUT, FORMAT, Trained, read_about

log = logging.getLogger(__name__)
WORKING = Path("/kaggle/working")


def write_trained(job, out):
    """Export a finished run to the folder `out` and return it; an earlier export there is replaced.

    Raises InputError if a step is missing or stale, or if `out` is a file or holds other files.
    """
    recipe, run, out = job.recipe, job.run, Path(out)
    rule, score, neutral = read_rule(job), read_score(job)[recipe.metric], recipe.neutral(job)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise InputError(f"--out {out}: holds other files; name an empty or a new folder")
    remove_leftovers(out)
    for name in _earlier_files(out):
        (out / name).unlink(missing_ok=True)
    sources = {f"fold{one.fold}-{one.stage}.safetensors": one.weights(run) for one in predicting_networks(job)}
    sources |= recipe.assets(job.config)
    about = {"format": FORMAT, "solution": job.solution, "preset": job.preset, "config": to_dict(job.config)}
    # an interrupted export is recognised as one, and as incomplete
    write_json(out / ABOUT, {**about, "files": dict.fromkeys(sources, ""), "rule": {}, "incomplete": True})
    files = {}
    for name, path in sources.items():
        with atomic_path(out / name) as temporary:
            shutil.copyfile(path, temporary)
        files[name] = file_hash(out / name)
    about |= {"git": run.manifest.get("git", ""), "packages": run.manifest.get("packages", {})}
    about |= {"score": {"metric": recipe.metric, **score}, "files": files, "neutral": neutral, "rule": rule}
    about["facts"] = job.images.about
    write_json(out / ABOUT, about)
    return out


def _earlier_files(out):
    """Return the names of the files of an earlier export in `out`; none if its trained.json is damaged."""
    try:
        return list(read_about(out)["files"])
    except InputError:
        return []


# ---- tools ---------------------------------------------------------------------------------------------------------


@contextmanager
def open_run(recipe, config_class, folder, **options):
    """Yield the Job of the run in `folder`, with its stored configuration and these Options.

    Raises InputError if the folder is not a run of this solution, or if another process works in it.
    """
    stored = Path(folder) / "config.json"
    if not stored.is_file():
        raise InputError(f"{folder}: not the folder of a finished run (no config.json)")
    values = read_json(stored)
    if not isinstance(values, dict) or values.pop("solution", None) != recipe.name:
        raise InputError(f"{stored}: not the configuration of a run of {recipe.name}")
    preset = values.pop("preset", "stored")
    with _job(recipe, preset, from_dict(config_class, values, str(stored)), Options(out=folder, **options)) as job:
        yield job


@contextmanager
def _job(recipe, preset, config, options):
    device, run = distributed.start(options.device), Run(options.out)
    try:
        yield Job(recipe.name, preset, config, options, run, device, Budget(None), recipe=recipe)
    finally:
        run.close()


def export_tool(recipe, config_class):
    """Return the tool `export` of a solution."""

    def export(run: Path, /, *, out: Path):
        """Export the weights and the decision rule of a finished run as one flat folder, from which `infer` predicts.

        It holds weights, configuration, decision rule and their hashes; the run and its images are not needed again.

        Args:
            run: Folder of the run.
            out: Folder for the files.
        """
        with open_run(recipe, config_class, run) as job:
            write_trained(job, out)
        files = [path for path in sorted(out.iterdir()) if path.suffix == ".safetensors"]
        log.info(f"{out}: {len(files)} files of weights, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
        return 0

    return export


def infer_tool(recipe, config_class, takes_sizes=False):
    """Return the tool `infer` of a solution; takes_sizes: whether --sizes applies to it."""

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
        """Predict test images from an exported folder and write a submission; no labels and no run are needed.

        Args:
            trained: Folder that the tool `export` wrote.
            data: The competition's folder, whose sample submission names the images; found automatically on Kaggle.
            test: Images to predict instead: a folder, or a CSV whose first column names them.
            out: The submission (default: submission.csv, on Kaggle in /kaggle/working).
            work: Folder for decoded images and predictions, from which an interrupted call continues; by default a
                temporary one that is deleted at the end.
            sizes: CSV files with width and height of the originals, for resized copies of the images (VinBigData).
            on_bad_image: placeholder: an image that cannot be read gets the neutral prediction.
            device: auto, cpu, cuda or cuda:<n>.
            workers: Processes that read images (default: one per core).
        """
        if sizes and not takes_sizes:
            raise InputError(f"--sizes does not apply to {recipe.name}")
        exported = Trained.open(trained, recipe.name)
        config = from_dict(config_class, exported.config, str(exported.folder / ABOUT))
        config = recipe.use_assets(config, {name: exported.folder / name for name in exported.files})
        out = out or (WORKING if WORKING.is_dir() else Path()) / "submission.csv"
        if out.is_dir():
            raise InputError(f"--out {out}: a folder; name the submission's file")
        with _work_folder(work) as folder:
            given = {"data": data, "test": test, "sizes": sizes, "device": device, "workers": workers}
            options = Options(out=folder, store=folder / "stores", on_bad_image=on_bad_image, **given)
            with _job(recipe, exported.preset, config, options) as job:
                job.facts = exported.facts
                images = prepare_test(job, recipe)
                exported.link(job.run)
                predict_test(job)
                log.info(f"valid submission: {write_answer(job, exported.rule, exported.neutral, out)[1]}")
                return max(job.left_out, int((~images.table["ok"]).sum()))

    return infer


@contextmanager
def _work_folder(folder):
    """Yield the folder to work in: the user's, which must not be a run or an export, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="infer-") as temporary:
            yield Path(temporary)
        return
    if (folder / "config.json").exists() or (folder / ABOUT).exists():
        raise InputError(f"--work {folder}: is a run or an exported folder; name another")
    yield folder
