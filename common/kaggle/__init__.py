"""Kaggle: files from it and submissions to it, by its own client, which is run as a program.

The client is never imported, since importing it asks for credentials.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True)
class Source:
    """Where a solution's files are on Kaggle, and how a submission to it is checked."""

    kind: Literal["competition", "dataset", "none"]
    slugs: tuple[str, ...] = ()
    """Of a competition its name; of datasets owner/name, each in a folder of its own where there are several."""
    code_competition: bool = False
    """True: submissions are made by a notebook's version, not by a file."""
    samples: tuple[str, ...] = ("sample_submission.csv",)
    """Names of the sample submission in the competition's folder, the first that is there counts."""
    check: Callable | None = None
    """check(path, sample): raises InputError where the submission cannot be one."""
    score: str = ""
    """Figure of a run's score.json that the leaderboard shows too, a dict of estimate, low and high."""
    advice: str = ""
    """Where the files are that Kaggle does not have."""


def offered(source, own=()):
    """Names of the tools that a solution with this Source has, beside its `own`; None: none."""
    if source is None:
        return ()
    asked = {"download": True, "upload": source.kind == "competition", "notebook": "infer" in own}
    return tuple(name for name, has in asked.items() if has)


def tools(solution, source, own=(), presets=()):
    """The functions of these tools, by name, for a solution with these presets; what they import is imported late."""
    from common.kaggle.download import download_tool
    from common.kaggle.notebook import notebook_tool
    from common.kaggle.upload import upload_tool

    made = {"download": download_tool, "upload": upload_tool, "notebook": partial(notebook_tool, presets=presets)}
    return {name: made[name](solution, source) for name in offered(source, own)}
