"""The tool `localise`: compare class activation maps with true boxes."""

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
    """Compare the class activation maps of a finished run with the true boxes of its images.

    Writes localisation.csv (a row per box, in pixels of the 1024 × 1024 image), localisation_table.csv (a row per
    class) and localisation.html (the table, and each class's box of median area and its best box).

    Args:
        run: Folder of the run.
        threshold: Threshold of the maps, scaled to [0, 1]. Of several, the best is chosen for each half of the patients
            on the boxes of the other half.
        boxes: Table of boxes to use instead of NIH's, in the format of a run's option --boxes; needs --out.
        out: Folder for the three files (default: the run's).
        device: auto, cpu, cuda or cuda:<n>.
        workers: Processes that read images.
    """
    for value in threshold:
        check(0 < value <= 1, f"--threshold must lie above 0 and be at most 1, not {value:g}")
    check(threshold, "--threshold: give at least one")
    if boxes is not None and out is None:
        raise InputError("--boxes: name a folder by --out, since the run's own figures are for NIH's boxes")
    check(out is None or not out.exists() or out.is_dir(), f"{out}: not a folder (--out)")
    with open_run(SOLUTION, Config, run, device=device, workers=workers) as job:
        if boxes is None and (out is None or out.resolve() == job.run.folder.resolve()):
            job.run.forget(STEP.name)  # always computed again, since the thresholds may differ
            run_step(job, replace(STEP, make=partial(write_localisation, thresholds=threshold)))
        else:
            key_of(job, STEP)  # refuses predictions of other networks
            write_localisation(job, threshold, out, boxes)
    return 0


TOOLS = {"localise": localise}
