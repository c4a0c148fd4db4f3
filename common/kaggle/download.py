"""`download`: a solution's files from Kaggle, resumed where it stopped, and unpacked."""

import logging
import os
import time
import zipfile
from pathlib import Path

from common.errors import InputError
from common.kaggle import client
from common.kaggle.unpack import Damaged, unpack
from common.paths import lock_folder, read_json, write_json

log = logging.getLogger(__name__)
DONE = ".kaggle-download.json"  # in the folder: what is there in full
PARTIAL = ".kaggle-partial"  # the client's note beside a file that has not fully arrived


def download_tool(solution, source):
    """The tool `download` of one solution."""

    def download(*, data: Path, again: bool = False):
        """Download the solution's files from Kaggle and unpack them into a folder, which --data of the verbs takes.

        Run it again after a break: it continues. What is there in full is not asked for again.

        Args:
            data: Folder for the files; made if it is not there.
            again: Download anew what is there already.
        """
        if source.kind == "none":
            raise InputError(f"{solution}: Kaggle does not have its files. {source.advice}")
        if data.exists() and not data.is_dir():
            raise InputError(f"--data {data}: is a file, not a folder")
        for slug in source.slugs:
            folder = data / slug.rsplit("/", 1)[-1] if len(source.slugs) > 1 else data
            with lock_folder(folder, "downloading into it"):
                fetch(source.kind, slug, folder, again)
        log.info(f"ready: --data {data}")
        return 0

    return download


def fetch(kind, slug, folder, again=False):
    """Download one competition or dataset into `folder` and unpack it there, continuing what is begun.

    The archive is removed when all of it is unpacked. Raises InputError, in one line, for whatever stops it.
    """
    target, archive = f"{kind} {slug}", folder / f"{slug.rsplit('/', 1)[-1]}.zip"
    record = read_json(folder / DONE) if (folder / DONE).is_file() else {}
    if slug in record and not again and not archive.exists():
        date, files = record[slug]["date"], record[slug]["files"]
        if sum(len(names) for _, _, names in os.walk(folder, followlinks=True)) > files:  # DONE is one more
            log.info(f"{target}: complete since {date}, {files:,} files (--again downloads it anew)")
            return
        log.info(f"{target}: was complete on {date}, but of its {files:,} files some are gone")
    try:
        if not _is_whole(archive):
            log.info(f"{target}: downloading to {archive}")
            client.run([f"{kind}s", "download", slug, "-p", str(folder)], target, archive, kind == "competition")
        if not archive.is_file():
            raise InputError(f"{target}: the client left no {archive}; has the folder room, and may it be written?")
        files, size = unpack(archive, folder)
    except Damaged as error:
        archive.unlink(missing_ok=True)
        Path(f"{archive}{PARTIAL}").unlink(missing_ok=True)
        raise InputError(
            f"{error}. It is removed, what was unpacked is kept; the same command downloads it again"
        ) from None
    except KeyboardInterrupt:
        log.info(client.AGAIN)
        raise
    record[slug] = {"date": time.strftime("%Y-%m-%d %H:%M"), "files": files, "bytes": size}
    write_json(folder / DONE, record)
    os.unlink(archive)
    log.info(f"{target}: {files:,} files, {size / 1e9:.3g} GB, in {folder}")


def _is_whole(archive):
    """Whether the archive has fully arrived: its table of contents stands at its end."""
    return archive.is_file() and not Path(f"{archive}{PARTIAL}").exists() and zipfile.is_zipfile(archive)
