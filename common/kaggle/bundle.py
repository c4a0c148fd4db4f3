"""`bundle`: all that a notebook without internet needs, as the one flat folder that a Kaggle dataset is."""

import logging
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from common.config import file_hash
from common.errors import InputError
from common.kaggle import client
from common.kaggle.wheels import IMAGE, build_wheel, fetch_wheels, own_requirements
from common.paths import lock_folder, read_json, write_json
from common.runs import git_revision
from common.trained import ABOUT, Trained

log = logging.getLogger(__name__)
LISTING = "bundle.json"
METADATA = "dataset-metadata.json"
FORMAT = 1
LIMIT = 200 * 10**9  # bytes of a dataset, of all private ones together: kaggle.com/docs/datasets
NOTEBOOK_LIMIT = 20 * 10**9  # bytes of /kaggle/working, for a bundle made in a notebook: kaggle.com/docs/notebooks
DATASET = "OWNER/chest-xray-bundle"  # where none is named: to be filled in
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SLUG = re.compile(r"[A-Za-z0-9-]+/[a-z0-9][a-z0-9-]{4,48}[a-z0-9]")


def bundle_tool(export):
    """The tool `bundle`; export(solution, run, out) writes the trained folder of a finished run."""

    def bundle(
        runs: tuple[Path, ...] = (),
        /,
        *,
        out: Path,
        python: Literal["3.11", "3.12", "3.13"] = IMAGE.python,
        upload: str | None = None,
    ):
        """Make one flat folder with our wheel, the wheels that Kaggle's image lacks, and what runs have learnt.

        Kaggle takes it as a dataset; a notebook without internet installs from it, see the verb `notebook`.

        Args:
            runs: Folders of finished runs, or what `export` made of them; none: to train on Kaggle.
            out: The folder; one that an earlier call made is replaced.
            python: The notebook's Python.
            upload: Dataset of yours, owner/name, to make of it, or to give a new version.
        """
        check_dataset(upload)
        write_bundle(runs, out, export, python, upload)
        if upload is not None:
            send(out, upload)
        return 0

    return bundle


def check_dataset(name):
    """Raise InputError unless `name` is None or can be the name of a dataset, owner/name."""
    if name is not None and not _SLUG.fullmatch(name):
        raise InputError(f"{name!r}: not a dataset's name; owner/name, of the name 6 to 50 of a-z, 0-9 and -")


def write_bundle(runs, out, export, python=IMAGE.python, dataset=None, limit=None):
    """Write the bundle `out` of these runs and return the content of its bundle.json.

    It is written aside and renamed when it is whole. limit: bytes (default: Kaggle's). Raises InputError for a run that
    is not finished, two runs of one name, a folder of something else in the way, and a bundle above the limit.
    """
    out = Path(out)
    if out.exists() and not (out / LISTING).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: holds other files; name an empty or a new folder")
    foreign = _foreign(out)
    if foreign:
        raise InputError(
            f"--out {out}: holds {foreign[0]}, which is no part of a bundle; move it, or name another folder"
        )
    with _aside(out) as folder:
        content = {name: _add_run(Path(run), name, folder, export) for name, run in _named(runs).items()}
        ours = build_wheel(folder)
        excluded = fetch_wheels(folder, python, own_requirements())
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in sorted(folder.iterdir())
        }
        about = {
            "format": FORMAT,
            "python": python,
            "image": IMAGE.date,
            "git": git_revision(),
            "wheel": ours.name,
            "excluded": {name: IMAGE.packages[name] for name in excluded},
            "runs": content,
            "files": files,
        }
        write_json(folder / LISTING, about)
        write_json(folder / METADATA, metadata(dataset or DATASET))  # not among the files: Kaggle does not keep it
        size = check_flat(folder, limit)
        _replace(folder, out)
    wheels = sum(name.endswith(".whl") for name in files)
    log.info(
        f"{out}: {len(files) + 2} files, {size / 1e6:.1f} MB of {(limit or _limit(out)) / 1e9:.0f} GB: "
        f"{wheels} wheels for Python {python}, {len(content)} run{'s' * (len(content) != 1)}"
    )
    log.info(f"left to the image of {IMAGE.date}: {', '.join(sorted(excluded, key=list(IMAGE.packages).index))}")
    return about


def _foreign(out):
    """Names in an earlier bundle's folder that are not its own: replacing it would lose them."""
    if not (out / LISTING).is_file():
        return []
    about = read_json(out / LISTING)
    known = {LISTING, METADATA, *(about.get("files", ()) if isinstance(about, dict) else ())}
    return sorted(path.name for path in out.iterdir() if path.name not in known)


@contextmanager
def _aside(out):
    """An empty folder beside `out`; it, and what a call that was killed left of it, is removed."""
    aside = out.resolve().with_name(f".{out.resolve().name}.partial")
    with lock_folder(aside, "making a bundle there"):
        for path in aside.iterdir():
            shutil.rmtree(path)
        (aside / "bundle").mkdir()
        try:
            yield aside / "bundle"
        finally:
            shutil.rmtree(aside)


def _named(runs):
    named = {}
    for run in runs:
        name = Path(run).resolve().name
        if name in named:
            raise InputError(f"{run}: a second run named {name}, the first is {named[name]}; rename one")
        if not _NAME.fullmatch(name):
            raise InputError(f"{run}: a run's name is part of file names: letters, digits, '.', '_', '+' and '-' only")
        named[name] = run
    return named


def _add_run(run, name, folder, export):
    """Put what the run has learnt into `folder`, its name before theirs; returns its entry of bundle.json."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder.parent) as temporary:
        source = run
        if not (run / ABOUT).is_file():
            stored = run / "config.json"
            if not stored.is_file():
                raise InputError(f"{run}: neither a run nor a trained folder (no config.json, no {ABOUT})")
            about = read_json(stored)
            if not isinstance(about, dict) or not isinstance(about.get("solution"), str):
                raise InputError(f"{stored}: not the configuration of a run")
            source = Path(temporary)
            export(about["solution"], run, source)
        trained, about = Trained.open(source), read_json(source / ABOUT)
        names = {part: f"{name}--{part}" for part in (ABOUT, *trained.files)}
        for part, flat in names.items():
            shutil.copyfile(source / part, folder / flat)
    return {"solution": about["solution"], "preset": about["preset"], "score": about["score"], "files": names}


def metadata(dataset):
    """The content of dataset-metadata.json."""
    title = dataset.split("/")[1].replace("-", " ")
    return {"title": title, "id": dataset, "licenses": [{"name": "other"}]}


def check_flat(folder, limit=None):
    """The size of a bundle in bytes; InputError where a name is not flat, or the size above Kaggle's limit."""
    limit = _limit(folder) if limit is None else limit
    for path in folder.iterdir():
        if not path.is_file() or path.is_symlink() or not _NAME.fullmatch(path.name):
            raise InputError(f"{path.name}: a dataset is flat: plain files, named by letters, digits and ._+- only")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > limit:
        largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        biggest = f"bundle fewer runs; the largest file is {largest.name}, {largest.stat().st_size / 1e9:.2f} GB"
        raise InputError(f"the bundle has {size / 1e9:.2f} GB, Kaggle takes {limit / 1e9:g} GB: {biggest}")
    return size


def _limit(folder):
    return NOTEBOOK_LIMIT if str(Path(folder).resolve()).startswith("/kaggle/working") else LIMIT


def _replace(folder, out):
    """Rename `folder` to `out`, where an earlier bundle may lie."""
    if out.exists():
        os.rename(out, folder.with_name("earlier"))  # removed with the folder that both are in
    os.rename(folder, out)


# ---- upload --------------------------------------------------------------------------------------------------------


def send(folder, dataset):
    """Make the dataset of a bundle on Kaggle, or a new version where it exists."""
    target = f"dataset {dataset}"
    about = read_json(Path(folder) / LISTING)
    if _exists(dataset):
        note = f"runs {', '.join(about['runs'])}; {about['git'] or 'no revision'}"
        words = ["version", "-p", str(folder), "-m", note]
    else:
        words = ["create", "-p", str(folder)]
    log.info(f"{target}: uploading a {'new version' if words[0] == 'version' else 'new dataset'}")
    said = client.run(["datasets", *words], target)
    if "is being created" not in said:
        raise InputError(client.explain(said, 0, target))
    log.info(f"{target}: sent; Kaggle takes some minutes to prepare it: https://www.kaggle.com/datasets/{dataset}")


def _exists(dataset):
    try:
        client.run(["datasets", "status", dataset], f"dataset {dataset}")
    except InputError as error:
        if "knows no such" in str(error) or "does not allow" in str(error):
            return False
        raise
    return True
