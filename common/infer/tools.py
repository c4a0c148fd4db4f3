"""The tools `export` and `infer` of every solution: from a finished run to a folder, from it to a submission."""

import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from common.budget import Budget
from common.config import from_dict
from common.data.store import prepare_store
from common.data.tables import named_images, read_ids
from common.errors import InputError
from common.job import Job as Context
from common.options import Options
from common.paths import find_images, read_json
from common.runs import Run
from common.steps import store_folder
from common.train import distributed
from common.trained import ABOUT, Trained, write_trained

log = logging.getLogger(__name__)
WORKING = Path("/kaggle/working")

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
            return options.test, ids, files_of(ids, files)
        folder = options.data or source.find_file().parent
    else:
        sample = source.find_file(options.data)
        folder, ids = sample.parent, read_ids(sample, columns)
        log.info(f"test images from {sample}")
    return folder, ids, files_of(ids, find_images(folder))


def files_of(ids, found):
    """The files of these images (id → path, in their order); InputError where one has none."""
    absent = [image_id for image_id in ids if image_id not in found]
    if absent:
        raise InputError(f"{len(absent)} test images have no file, the first is {absent[0]}")
    return {image_id: found[image_id] for image_id in ids}


def test_store(context, folder, files):
    """Decode the test images `files` (id → path) into their store and return it."""
    options = context.options
    return prepare_store(
        files,
        store_folder(context, folder, files, context.config.store_size),
        context.config.store_size,
        workers=None if options.workers is None else max(options.workers, 1),
        on_bad_image=options.on_bad_image,
        placeholder_ids=frozenset(files),
    )


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
                data=data,
                out=folder,
                store=folder / "stores",
                test=test,
                sizes=sizes,
                on_bad_image=on_bad_image,
                device=device,
                workers=workers,
            )
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
