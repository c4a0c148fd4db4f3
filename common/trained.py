"""What a run has learnt, as one flat folder that needs nothing else of the run.

A trained folder holds `fold<k>-<stage>.safetensors`, whatever other weights the solution needs, and trained.json:
format, solution, preset, config (as in config.json), git and packages (of the run), score (metric, estimate, low,
high), files (name to SHA-256), neutral (what an unreadable image gets) and rule (what `tune` wrote).
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import file_hash, to_dict
from common.errors import InputError
from common.paths import atomic_path, check_id, read_json, write_json

FORMAT = 1
ABOUT = "trained.json"
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
    write_json(
        out / ABOUT,
        {
            "format": FORMAT,
            "solution": context.solution,
            "preset": context.preset,
            "config": to_dict(context.config),
            "git": manifest.get("git", ""),
            "packages": manifest.get("packages", {}),
            "score": {"metric": learnt.metric, **learnt.score},
            "files": files,
            "neutral": learnt.neutral,
            "rule": learnt.rule,
        },
    )
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
