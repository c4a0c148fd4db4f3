"""Exported folders on the Hugging Face hub: the commands `push` and `pull`, and `infer hf://you/name`.

The account is the one of huggingface_hub (`hf auth login` or HF_TOKEN); HF_ENDPOINT selects another hub.
"""

import contextlib
import os
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCardData, errors

from common.config import digest
from common.errors import InputError, check, log
from common.metrics.statistics import format_interval
from common.paths import copy_file
from common.trained import ABOUT, Trained, clear_export, read_about

CARD_FILE = "README.md"
TASKS = {"segmentation": "image-segmentation", "detection": "object-detection"}  # if the labels decide the task
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, as an account with access"


def repo_of(address):
    """Return "you/name" for an address hf://you/name (possibly turned into a path), None for anything else."""
    found = re.fullmatch(r"hf:/+([^/]+/[^/]+)", str(address))
    return found and found[1]


def fetch(repo):
    """Download the export `repo`, only the files that it lists, and return its folder in the hub's cache.

    Raises InputError if the repository cannot be read or contains no export. `Trained.open` verifies the files.
    """
    api = _api(repo)
    with _one_line(repo):
        revision = api.model_info(repo).sha  # a fixed commit, even if another is pushed meanwhile
        folder = Path(api.hf_hub_download(repo, ABOUT, revision=revision)).parent
        for name in read_about(folder)["files"]:
            api.hf_hub_download(repo, name, revision=revision)
        with contextlib.suppress(errors.EntryNotFoundError):
            api.hf_hub_download(repo, CARD_FILE, revision=revision)
    return folder


def pull(repo: str, /, *, out: Path):
    """Download an exported folder from the Hugging Face hub and verify its files; `infer` predicts from it.

    Args:
        repo: The repository, as you/name.
        out: Folder for the files; an earlier export there is replaced.
    """
    exported = Trained.open(fetch(repo_of(repo) or repo))
    clear_export(out)
    for name in (*exported.files, *[CARD_FILE] * (exported.folder / CARD_FILE).is_file(), ABOUT):
        copy_file(exported.folder / name, out / name)
    log.info(f"{out}: {len(exported.files)} files of a run of {exported.solution}, verified")
    return 0


def push_tool(card_of):
    """Return the tool `push`; card_of(solution) -> its Card."""

    def push(folder: Path, /, *, repo: str, public: bool = False):
        """Upload an exported folder with a model card to the Hugging Face hub; an earlier upload is replaced.

        Args:
            folder: Folder that the tool `export` wrote; your own README.md in it is used as the card.
            repo: The repository, as you/name; it is created if it does not exist.
            public: Create a public repository; by default it is private.
        """
        exported, api = Trained.open(folder), _api(repo)
        card = read_card(folder) or write_card(read_about(folder), card_of(exported.solution), repo)
        files = {name: folder / name for name in (*exported.files, ABOUT)} | {CARD_FILE: card}
        with _one_line(repo):
            api.create_repo(repo, private=not public, exist_ok=True)
            changes = [CommitOperationAdd(name, content) for name, content in files.items()]
            changes += [CommitOperationDelete(name) for name in _earlier_files(api, repo) if name not in files]
            commit = api.create_commit(repo, changes, commit_message=f"{exported.solution}, {exported.preset}")
        log.info(f"{len(files)} files in {commit.repo_url}; `infer hf://{repo}` predicts from them")
        return 0

    return push


def _earlier_files(api, repo):
    """Return the names of the files of an earlier export in a repository."""
    with contextlib.suppress(errors.EntryNotFoundError, InputError):  # none yet, or not readable
        listed = read_about(Path(api.hf_hub_download(repo, ABOUT)).parent)["files"]
        return [file.rfilename for file in api.model_info(repo).siblings if file.rfilename in listed]
    return []


def read_card(folder):
    """Return the model card in an exported folder; None if there is none, or one by `write_card` for another export."""
    path = Path(folder) / CARD_FILE
    card = path.read_bytes() if path.is_file() else None
    mark = re.search(rb"<!-- of the export (\w+) -->", card or b"")
    if mark is None or mark[1].decode() == digest(read_about(folder)):
        return card
    log.info(f"{path}: describes another export; the repository gets a new card")
    return None


def write_card(about, card, repo):
    """Return the model card (README.md as bytes) from an export's trained.json and its solution's Card."""
    name, score, phantoms = about["solution"], about.get("score", {}), about.get("synthetic")
    task = TASKS.get(about.get("facts", {}).get("task"), card.task)
    data = "generated phantoms" if phantoms else card.data
    known = {"license": "other", "pipeline_tag": task, "tags": ["chest-x-ray", "radiology", name]}
    rows = {"Task": task, "Data": data, "Licence of the data": None if phantoms else card.licence}
    if score.get("estimate") is not None:
        interval = {key: score.get(key) for key in ("low", "high")}
        result = EvalResult(task, name, data, score["metric"], score["estimate"], metric_args=interval)
        known |= {"model_name": f"{name} {about['preset']}", "eval_results": [result]}
        rows["Score"] = f"{score['metric']} {format_interval(score)}, 95 % interval, out of fold on the training data"
    rows |= {"Code": about.get("git"), "Command": f"`cxr {about['command']}`" if about.get("command") else None}
    facts = "\n".join(f"- {title}: {value}" for title, value in rows.items() if value)
    head = f"---\n{ModelCardData(**known).to_yaml()}\n---\n\n# {name} {about['preset']}\n\nNot a medical device.\n\n"
    end = f"```\ncxr {name} infer hf://{repo} --test FOLDER\n```\n\n<!-- of the export {digest(about)} -->\n"
    return f"{head}{facts}\n\n{end}".encode()


def _api(repo):
    check(re.fullmatch(r"[\w.-]+/[\w.-]+", repo), f"{repo!r}: name a repository of the hub as you/name")
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@contextlib.contextmanager
def _one_line(repo):
    """Turn an error of the hub or the connection into a one-line InputError."""
    try:
        yield
    except InputError:
        raise
    except errors.EntryNotFoundError as error:
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        reason = "the hub cannot be reached" if offline else f"not an export: it has no {ABOUT}, or lacks a file of it"
        raise InputError(f"{repo}: {reason}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        unknown = f"no such repository for this account; {_LOG_IN}"
        reason = {401: unknown, 403: f"not allowed; {_LOG_IN}", 404: unknown}.get(status, f"the hub answered {status}")
        raise InputError(f"{repo}: {reason}") from None
    except (errors.HTTPError, OSError, ValueError) as error:  # no connection, a full disk, an impossible name
        raise InputError(f"{repo}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
