"""An exported folder: the files of a finished run that prediction needs.

It holds `fold<k>-<stage>.safetensors` (and .onnx after `export --onnx`), the recipe's further assets, and trained.json:
format, solution, preset, config (as in config.json), git, packages and command (of the run), synthetic (whether its
images are phantoms), score (metric, estimate, low, high), files (name to SHA-256), neutral (the prediction for an
unreadable image), facts (the `about` of the run's Images) and rule (the content of tuned.json). The folder is flat
because Kaggle's datasets are. An exported blend also has `mixing` (see common.blend) and `members`: the content of each
member's trained.json by its number, with which its file names begin.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import file_hash
from common.errors import InputError, check
from common.paths import check_id, read_json, remove_leftovers

FORMAT = 1
ABOUT = "trained.json"
_FIELDS = {"solution": str, "preset": str, "config": dict, "files": dict, "rule": dict}
_OPTIONAL = ("facts", "mixing", "members", "score")
_MIXING = {"names": list, "runs": list, "weights": dict, "average": str, "iou": (int, float)}


@dataclass(frozen=True)
class Trained:
    """An exported folder with verified files; config: a dict for `common.config.from_dict`."""

    folder: Path
    solution: str
    preset: str
    config: dict
    rule: dict
    neutral: Any
    facts: dict
    files: tuple[str, ...]
    mixing: dict
    members: dict
    prefix: str = ""

    @classmethod
    def open(cls, folder, solution=None):
        """Open an exported folder, of `solution` if given, and check the hashes of all its files.

        Raises InputError naming the folder or file: not exported, for another solution, missing or changed.
        """
        folder = Path(folder)
        about = read_about(folder)
        check(not about.get("incomplete"), f"{folder}: an incomplete export; run `export` again")
        fits = solution in (None, about["solution"])
        check(fits, f"{folder}: exported from a run of {about['solution']}, not {solution}")
        for name, sha256 in about["files"].items():
            path = folder / name
            check(path.is_file(), f"{path}: missing; copy the exported folder again")
            if file_hash(path) != sha256:
                raise InputError(f"{path}: not the file that was exported (its SHA-256 differs); copy it again")
        return cls.of(folder, about)

    @classmethod
    def of(cls, folder, about, prefix=""):
        """Return the export (or the member of a blend whose files begin with `prefix`) for trained.json's content."""
        _check_about(about, Path(folder) / ABOUT)
        values = (about[name] for name in ("solution", "preset", "config", "rule"))
        members = {k: cls.of(folder, member, f"{prefix}{k}-") for k, member in about.get("members", {}).items()}
        more = about.get("facts", {}), tuple(about["files"]), about.get("mixing", {}), members, prefix
        return cls(folder, *values, about.get("neutral"), *more)

    def file(self, name):
        """Return the path of a file of this export or member."""
        return self.folder / f"{self.prefix}{name}"

    def link(self, run):
        """Link the weights and ONNX files into a Run's folder, where its trainings would write them."""
        for name in self.files:
            found = re.fullmatch(r"(fold\d+)-(.+)\.(safetensors|onnx)", name)
            if found:
                place = run.path(found[1], found[2], f"final.{found[3]}")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.unlink(missing_ok=True)
                place.symlink_to(self.file(name).resolve())


@dataclass(frozen=True)
class Card:
    """Contents of a solution's model card: its task (a term of the hub), the data, and a note on their licence."""

    task: str
    data: str
    licence: str


def clear_export(out):
    """Delete an earlier export in `out`, if any. Raises InputError if `out` is a file or contains other files."""
    check(not out.exists() or out.is_dir(), f"--out {out}: not a folder")
    remove_leftovers(out)  # left by an export that was killed before its first file
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise InputError(f"--out {out}: holds other files; name an empty or a new folder")
    with contextlib.suppress(InputError):  # a damaged trained.json
        for name in read_about(out)["files"]:
            (out / name).unlink(missing_ok=True)


def read_about(folder):
    """Return the content of trained.json. Raises InputError for wrong types and unsafe file names."""
    path = Path(folder) / ABOUT
    check(path.is_file(), f"{folder}: not an exported folder (no {ABOUT}); the tool `export` writes one")
    about = read_json(path)
    found = about.get("format") if isinstance(about, dict) else None
    check(found == FORMAT, f"{path}: format {found!r}, but this program reads format {FORMAT}")
    _check_about(about, path)
    return about


def _check_about(about, path):
    check(isinstance(about, dict), f"{path}: a member is not what `export` writes")
    _check_types(about, _FIELDS | {name: dict for name in _OPTIONAL if name in about}, path)
    members, score, mixing = (about.get(name, {}) for name in ("members", "score", "mixing"))
    if score.get("estimate") is not None:
        _check_types(score, {"metric": str, "estimate": (int, float)}, f"{path}: score")
    if members:
        _check_types(mixing, _MIXING, f"{path}: mixing")
        weights = mixing["weights"].get("None")
        fits = isinstance(weights, list) and len(weights) == len(mixing["names"]) >= len(members)
        check(fits and len(mixing["runs"]) == len(members), f"{path}: mixing does not fit the members")
    for name in (*about["files"], *members):
        check_id(name, f"{path}: files")


def _check_types(values, types, where):
    for name, kind in types.items():
        check(isinstance(values.get(name), kind), f"{where}: {name} is missing or not what `export` writes")
