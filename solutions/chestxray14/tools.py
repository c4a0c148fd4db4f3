"""The tool `localise`: class activation maps against boxes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from common.errors import InputError, check
from common.job import open_run
from common.step import key_of, run_step
from solutions.chestxray14.config import Config
from solutions.chestxray14.localise import STEP, THRESHOLDS, write_localisation
from solutions.chestxray14.pipeline import SOLUTION


def localise(
    run: Path,
    /,
    *,
    threshold: tuple[float, ...] = THRESHOLDS,
    boxes: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
):
    """Measure the class activation maps of a finished run against the true boxes of its images.

    Writes localisation.csv (a row per box, in pixels of the 1024 × 1024 image), localisation_table.csv (a row per
    class) and localisation.html (the table, and the box of median area and the best one of each class).

    Args:
        run: Folder of the run.
        threshold: Of the maps, scaled to [0, 1]. One is used as it is; of several the best is chosen on the boxes of
            one half of the patients for those of the other.
        boxes: Table of boxes to measure on instead of NIH's, as for the option --boxes of a run; needs --out.
        out: Folder for the three files; the run's by default.
        device: auto, cpu, cuda or cuda:<n>.
        workers: Processes that read images.
    """
    for value in threshold:
        check(0 < value <= 1, f"--threshold must lie above 0 and be at most 1, not {value:g}")
    check(threshold, "--threshold: name one or several")
    if boxes is not None and out is None:
        raise InputError("--boxes: name the folder for the figures by --out; the run's own are those of NIH's boxes")
    check(out is None or not out.exists() or out.is_dir(), f"{out}: not a folder (--out)")
    with open_run(SOLUTION, Config, run, device=device, workers=workers) as job:
        if boxes is None and (out is None or out.resolve() == job.run.folder.resolve()):
            job.run.forget(STEP.name)  # always computed again: the thresholds may be other ones
            run_step(job, replace(STEP, make=partial(write_localisation, thresholds=threshold)))
        else:
            key_of(job, STEP)  # refuses predictions of other networks
            write_localisation(job, threshold, out, boxes)
    return 0


TOOLS = {"localise": localise}
