"""`download`: fetch a solution's files from Kaggle and unpack the untrusted archives; interrupted calls can resume."""

import os
import time
import zipfile
from pathlib import Path

from common.errors import InputError, check, log
from common.kaggle.client import AGAIN, connect
from common.kaggle.unpack import DamagedArchive, unpack
from common.paths import lock_folder, read_json, write_json

DONE = ".kaggle-download.json"  # in the folder: the record of complete downloads
PARTIAL = ".kaggle-partial"  # the client's marker beside an incomplete file


def download_tool(solution, source):
    """Return the tool `download` of one solution."""

    def download(*, data: Path, again: bool = False):
        """Download the solution's files from Kaggle and unpack them into a folder, the --data of the verbs.

        After an interruption the same command continues. Complete downloads are not repeated.

        Args:
            data: Folder for the files; created if missing.
            again: Download again what is already there.
        """
        check(source.kind != "none", f"{solution}: Kaggle does not have its files. {source.advice}")
        check(not data.exists() or data.is_dir(), f"--data {data}: is a file, not a folder")
        for slug in source.slugs:
            folder = data / slug.rsplit("/", 1)[-1] if len(source.slugs) > 1 else data
            with lock_folder(folder, "downloading into it"):
                fetch(source.kind, slug, folder, again)
        log.info(f"ready: --data {data}")
        return 0

    return download


def fetch(kind, slug, folder, again=False):
    """Download one competition or dataset into `folder` and unpack it there, continuing an earlier attempt."""
    target, archive = f"{kind} {slug}", folder / f"{slug.rsplit('/', 1)[-1]}.zip"
    done = _read_done(folder / DONE)
    if slug in done and not again and not archive.exists():
        date, files = done[slug].get("date"), done[slug]["files"]
        if sum(len(names) for _, _, names in os.walk(folder, followlinks=True)) > files:  # the folder also holds DONE
            log.info(f"{target}: complete since {date}, {files:,} files (--again downloads it again)")
            return
        log.info(f"{target}: was complete on {date}, but some of its {files:,} files are gone")
    partial = Path(f"{archive}{PARTIAL}")
    try:
        # the table of contents is at the end of a zip, so an incomplete one is no zip file
        if partial.exists() or not zipfile.is_zipfile(archive):
            log.info(f"{target}: downloading to {archive}")
            with connect(target, needs_account=kind == "competition") as api:
                fetch_files = api.competition_download_files if kind == "competition" else api.dataset_download_files
                fetch_files(slug, str(folder), quiet=False)
        files, size = unpack(archive, folder)
    except DamagedArchive as error:
        archive.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        raise InputError(f"{error}. It is removed; the same command downloads it again") from None
    except KeyboardInterrupt:
        log.info(AGAIN)
        raise
    done[slug] = {"date": time.strftime("%Y-%m-%d %H:%M"), "files": files, "bytes": size}
    write_json(folder / DONE, done)
    archive.unlink()
    log.info(f"{target}: {files:,} files, {size / 1e9:.3g} GB, in {folder}")


def _read_done(path):
    """Return the record of complete downloads by slug; {} if there is none or it is damaged."""
    try:
        return {slug: {**entry, "files": entry["files"] + 0} for slug, entry in read_json(path).items()}
    except (AttributeError, KeyError, TypeError, InputError):
        return {}
