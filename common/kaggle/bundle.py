"""`bundle`: put everything that a notebook without internet needs into one flat folder, to upload as a dataset."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from common.config import file_hash
from common.errors import InputError, check, log
from common.kaggle.client import connect
from common.kaggle.wheels import IMAGE, build_wheel, fetch_wheels, own_requirements
from common.paths import lock_folder, read_json, write_json
from common.runs import git_revision
from common.trained import ABOUT, Trained

LISTING = "bundle.json"
METADATA = "dataset-metadata.json"
FORMAT = 1
DATASET_LIMIT = 200 * 10**9  # bytes of a dataset, and of all private ones together: kaggle.com/docs/datasets
OUTPUT_LIMIT = 20 * 10**9  # bytes of /kaggle/working: kaggle.com/docs/notebooks
RESERVE = 0.25  # hours that the verbs after training have until the end of a session
DATASET = "OWNER/chest-xray-bundle"  # placeholder for the user's dataset
NEW, EARLIER, EXPORT = "bundle", "earlier", "export"  # within the temporary folder
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SLUG = re.compile(r"[A-Za-z0-9-]+/[a-z0-9][a-z0-9-]{4,48}[a-z0-9]")


def bundle_tool(export):
    """Return the tool `bundle`; export(solution, run, out) writes the trained folder of a finished run."""

    def bundle(
        runs: tuple[Path, ...] = (),
        /,
        *,
        out: Path,
        python: Literal["3.11", "3.12", "3.13"] = IMAGE.python,
        upload: str | None = None,
    ):
        """Make one flat folder with our wheel, the wheels that Kaggle's image lacks, and the weights and rules of runs.

        As a dataset on Kaggle, a notebook without internet installs from it; see the tool `notebook`.

        Args:
            runs: Folders of finished runs, or what `export` made of them; none: to train on Kaggle.
            out: The folder; an earlier bundle there is replaced.
            python: The notebook's Python.
            upload: Your dataset, owner/name, to create from it or to give a new version.
        """
        check_dataset_name(upload)
        write_bundle(runs, out, export, python, upload)
        if upload is not None:
            upload_bundle(out, upload)
        return 0

    return bundle


def check_dataset_name(name):
    """Raise InputError unless `name` is None or a valid dataset name, owner/name."""
    if name is not None and not _SLUG.fullmatch(name):
        raise InputError(f"{name!r}: not a dataset's name: owner/name, with a name of 6 to 50 of a-z, 0-9 and -")


def check_name(name, where):
    """Raise InputError unless `name` can be part of a file name in a bundle; `where` begins the message."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise InputError(f"{where}: {name!r} cannot be part of file names: letters, digits, '.', '_', '+', '-' only")


def read_listing(bundle):
    """Return the content of a bundle's bundle.json; raise InputError if it is damaged or has unsafe names."""
    path = Path(bundle) / LISTING
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{path}: not of format {FORMAT}, the one that this program reads")
    try:
        runs = {run: (entry["solution"], dict(entry["files"])) for run, entry in about["runs"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: damaged; upload the bundle again") from None
    for name in [*runs, *(name for _, files in runs.values() for pair in files.items() for name in pair)]:
        check_name(name, path)
    return about


def write_bundle(runs, out, export, python=IMAGE.python, dataset=None):
    """Write the bundle of these runs to the folder `out`, atomically, and return the content of its bundle.json."""
    out = Path(out).resolve()
    _check_replaceable(out)
    with _temporary_folder(out) as folder:
        content = {}
        for run in map(Path, runs):
            name = run.resolve().name
            check_name(name, run)
            check(name not in content, f"{run}: a second run named {name}; rename one")
            content[name] = _add_run(run, name, folder, export)
        wheel, excluded = build_wheel(folder), fetch_wheels(folder, python, own_requirements())
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(folder.iterdir())}
        about = {"format": FORMAT, "python": python, "image": IMAGE.date, "git": git_revision(), "wheel": wheel.name}
        about["excluded"] = {name: IMAGE.packages[name] for name in excluded}
        about |= {"runs": content, "files": files}
        write_json(folder / LISTING, about)
        title = (dataset or DATASET).split("/")[1].replace("-", " ")
        metadata = {"title": title, "id": dataset or DATASET, "licenses": [{"name": "other"}]}
        write_json(folder / METADATA, metadata)  # not listed: Kaggle does not keep it in the dataset
        limit = OUTPUT_LIMIT if str(out).startswith("/kaggle/working") else DATASET_LIMIT
        size, largest = sum(file["bytes"] for file in files.values()), max(files, key=lambda name: files[name]["bytes"])
        if size > limit:
            found = f"the largest file is {largest}, {files[largest]['bytes'] / 1e9:.2f} GB"
            taken = f"the bundle has {size / 1e9:.2f} GB, Kaggle takes {limit / 1e9:g} GB"
            raise InputError(f"{taken}: bundle fewer runs; {found}")
        if out.exists():
            os.rename(out, folder.with_name(EARLIER))  # removed with the temporary folder
        os.rename(folder, out)
    wheels = sum(name.endswith(".whl") for name in files)
    parts = f"{wheels} wheels for Python {python}, {len(content)} run{'s' * (len(content) != 1)}"
    log.info(f"{out}: {len(files) + 2} files, {size / 1e6:.1f} MB of {limit / 1e9:.0f} GB: {parts}")
    expected = ", ".join(name for name in IMAGE.packages if name in excluded)
    log.info(f"expected in Kaggle's image of {IMAGE.date}: {expected}")
    return about


def _check_replaceable(out):
    """Raise InputError if replacing `out` would delete files that do not belong to an earlier bundle."""
    if not (out / LISTING).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out}: holds other files; name an empty or a new folder")
        return
    about = read_json(out / LISTING)
    files = about.get("files") if isinstance(about, dict) else None
    _check_known(out, {LISTING, METADATA, *(files if isinstance(files, dict) else ())})


def _check_known(folder, names):
    """Raise InputError if a folder to be replaced contains files that are not in `names`."""
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in names):
        raise InputError(f"{folder}: holds {foreign[0]}, which is not part of a bundle; move it or name another --out")


@contextmanager
def _temporary_folder(out):
    """Yield an empty folder on the same disk as `out`; delete it afterwards, with any leftovers of a killed call."""
    partial = out.with_name(f".{out.name}.partial")
    with lock_folder(partial, "making a bundle there"):
        _check_known(partial, (NEW, EARLIER, EXPORT))
        try:
            for name in (NEW, EXPORT, *[EARLIER] * out.exists()):
                shutil.rmtree(partial / name, ignore_errors=True)
            (partial / NEW).mkdir()
            yield partial / NEW
        finally:
            if (partial / EARLIER).exists() and not out.exists():
                os.rename(partial / EARLIER, out)
            shutil.rmtree(partial)


def _add_run(run, name, folder, export):
    """Copy the trained folder of a run into `folder`, file names prefixed by `name`; return its bundle.json entry."""
    source = run
    if not (run / ABOUT).is_file():
        config = read_json(run / "config.json") if (run / "config.json").is_file() else None
        if not isinstance(config, dict) or not isinstance(config.get("solution"), str):
            raise InputError(f"{run}: neither a run nor a trained folder (no {ABOUT}, no config.json or a damaged one)")
        source = folder.with_name(EXPORT)
        export(config["solution"], run, source)
    trained, about = Trained.open(source), read_json(source / ABOUT)
    files = {part: f"{name}--{part}" for part in (ABOUT, *trained.files)}
    for part, flat in files.items():
        shutil.copyfile(source / part, folder / flat)
    shutil.rmtree(folder.with_name(EXPORT), ignore_errors=True)
    return {"solution": trained.solution, "preset": trained.preset, "score": about.get("score"), "files": files}


def upload_bundle(folder, dataset):
    """Create the dataset of a bundle on Kaggle, or a new version of it."""
    target, about, new = f"dataset {dataset}", read_json(Path(folder) / LISTING), False
    with connect(target) as api:
        try:
            api.dataset_status(dataset)
        except OSError as error:  # Kaggle answers 403 both for missing datasets and for other users' private ones
            new = getattr(getattr(error, "response", None), "status_code", 0) in (403, 404)
            if not new:
                raise
        log.info(f"{target}: uploading a new {'dataset' if new else 'version'}")
        if new:
            answer = api.dataset_create_new(str(folder), dir_mode="zip")
        else:
            note = f"runs {', '.join(about['runs'])}; {about['git'] or 'no revision'}"
            answer = api.dataset_create_version(str(folder), note, dir_mode="zip")
        check(answer.status.lower() == "ok", f"{target}: refused: {answer.error or 'no reason given'}")
    log.info(f"{target}: sent; Kaggle takes some minutes to prepare it: https://www.kaggle.com/datasets/{dataset}")
