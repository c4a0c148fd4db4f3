"""Functions for notebooks on Kaggle: open a bundle's trained folders, train within the session's hours, show images."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from common.data.dicom import read_image
from common.data.store import to_square
from common.errors import STOPPED, InputError, check, log
from common.kaggle.bundle import OUTPUT_LIMIT, RESERVE, read_listing
from common.paths import KAGGLE_INPUT, list_images, name_images, read_json
from common.report.gallery import box_overlay, gallery, label_boxes, outline_overlay

WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
SAVING = 1 / 12  # hours that Kaggle has to save the output
TIMED_OUT = -1  # takes the place of an exit status
RUN = "run"  # folder of the run in WORKING


def open_bundle(bundle, run):
    """Return the trained folder of one run of a bundle: a temporary folder of links to its files."""
    bundle = Path(bundle)
    runs = read_listing(bundle)["runs"]
    check(run in runs, f"{bundle}: has no run {run}, but {', '.join(runs)}")
    entry = runs[run]
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    for name, flat in entry["files"].items():
        check((bundle / flat).is_file(), f"{bundle / flat}: missing; upload the bundle again")
        (folder / name).symlink_to((bundle / flat).resolve())
    return folder


def read_images(source, ids, size=None, markers=None, folder=None):
    """Return images of the mounted competition, or of `folder`, by id, uint8 (H, W); with `size`, as squares."""
    folder = folder or source.find_file(names=markers).parent
    files = name_images(list_images(folder), folder)
    images = {image_id: read_image(files[image_id]) for image_id in ids}
    return images if size is None else {name: to_square(image, size) for name, image in images.items()}


def display_gallery(items, overlay=outline_overlay):
    """Show a gallery in the notebook; items and overlay are those of common.report.gallery."""
    from IPython.display import HTML, display  # late: only notebooks have it

    display(HTML(str(gallery(items, overlay=overlay))))


def display_boxes(source, found, names, count=4, size=None, folder=None):
    """Show the `count` images with the highest scores of a detection table, with their best boxes, in the notebook.

    names: of the classes; source, size and folder as in `read_images`.
    """
    best, items = found.groupby("image_id")["score"].max().nlargest(count).index, []
    for image_id, image in read_images(source, best, size, folder=folder).items():
        boxes = label_boxes(found[found["image_id"] == image_id], names)
        items.append((image, None, boxes, f"{image_id}: {boxes[0][1]}"))
    display_gallery(items, box_overlay)


def train_in_session(solution, preset, hours, options=(), working=WORKING, inputs=KAGGLE_INPUT):
    """Run or continue a preset within the session's `hours`; return whether it is finished.

    Training stops RESERVE hours before the end. A step that still runs SAVING hours before the end is killed, which is
    safe because files are written atomically. If an earlier version's output is among the inputs, it is continued.
    Several GPUs are used through torchrun. Decoded images stay out of the working folder, whose size is limited.
    options: further words of the command line. Raises InputError if the run fails or its output is too large.
    """
    check(hours > RESERVE, f"hours must be above {RESERVE:g}, not {hours:g}")
    run = _find_run(Path(working) / RUN, solution, preset, inputs)
    store, gpus = Path(tempfile.gettempdir()) / "stores", _count_gpus()
    words = ["run", preset, "--out", str(run), "--store", str(store), "--hours", f"{hours - RESERVE:g}", *options]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    log.info(f"{gpus} GPUs" + (", by torchrun" if launch else "") + f"; decoded images in {store}, not in the output")
    earlier = _read_log(run)
    status = _run_for([sys.executable, *launch, "-m", "solutions", solution, *words], 3600 * (hours - SAVING))
    used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    log.info(f"{run}: {used / 1e9:.2f} GB of {OUTPUT_LIMIT / 1e9:.0f} GB of output")
    if used > OUTPUT_LIMIT:
        raise InputError(f"{run}: {used / 1e9:.2f} GB are above the output's limit; name fewer --folds a version")
    # torchrun has one exit status for all failures, so read the log, without an earlier version's part
    if status in (STOPPED, TIMED_OUT) or (status and launch and "stopped: " in _read_log(run)[len(earlier) :]):
        log.info("not finished: save this version, add its output to the notebook's inputs and run it again")
        return False
    check(not status, f"{solution} {preset}: ended with status {status}; see above for the reason")
    return True


def _find_run(run, solution, preset, inputs):
    """Return `run`; a new run starts as a copy of this preset's most advanced earlier output among the inputs."""
    if (run / "config.json").is_file():
        return run
    found = []
    for config in Path(inputs).rglob("config.json"):
        with contextlib.suppress(InputError):  # other mounted datasets
            about = read_json(config)
            if isinstance(about, dict) and (about.get("solution"), about.get("preset")) == (solution, preset):
                found.append((len(list(config.parent.glob("fold*/*/*"))), config.parent))
    if not found:
        log.info(f"{run}: a new run; no earlier output of {solution} {preset} is mounted")
        return run
    earlier = max(found)[1]
    shutil.copytree(earlier, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    for path in [run, *run.rglob("*")]:  # Kaggle's mounts are read-only
        os.chmod(path, path.stat().st_mode | 0o200)
    shutil.copyfile(earlier / "config.json", run / "config.json")  # last, so an interrupted copy is repeated
    log.info(f"{run}: continues {earlier}")
    return run


def _read_log(run):
    path = run / "log.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _run_for(words, seconds):
    """Run a program for at most `seconds`, then stop it and its children; return its status or TIMED_OUT."""
    process = subprocess.Popen(words, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        log.info("the session's hours are over: stopping the run")
    finally:
        for number, patience in ((signal.SIGTERM, 120), (signal.SIGKILL, None)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
    return TIMED_OUT


def _count_gpus():
    import torch

    return torch.cuda.device_count()
