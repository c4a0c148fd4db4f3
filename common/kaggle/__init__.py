"""Kaggle: downloads, uploads, bundles and notebooks, using Kaggle's own client."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from common.paths import competition_file

TOOLS = {
    "download": "download and unpack the images",
    "upload": "validate a submission, send it to Kaggle and wait for its score",
    "notebook": "write a notebook for Kaggle that predicts from a run, or that trains",
}


@dataclass(frozen=True)
class Source:
    """A solution's files on Kaggle, and the check of its submissions."""

    kind: Literal["competition", "dataset", "none"]
    slugs: tuple[str, ...] = ()
    """The competition's name; or the datasets, owner/name, in separate folders if there are several."""
    code_competition: bool = False  # True: submissions are versions of a notebook, not files.
    samples: tuple[str, ...] = ("sample_submission.csv",)
    """Possible names of the sample submission in the competition's folder; the first that exists is used."""
    check: Callable | None = None  # check(path, sample): raises InputError for an invalid submission.
    score: str = ""  # Key of score.json that corresponds to the leaderboard's score: a dict of estimate, low and high.
    advice: str = ""  # Where to get files that Kaggle does not have.

    def find_file(self, data=None, names=None):
        """Return the first of `names` (default: the samples) in the competition's folder, else InputError."""
        return competition_file(data, self.slugs[0].split("/")[-1], names or self.samples)


def tool_names(source):
    """Return a line of help for each Kaggle tool of a solution with this Source, by name; {} for None."""
    if source is None:
        return {}
    return {name: line for name, line in TOOLS.items() if name != "upload" or source.kind == "competition"}


def load_tools(solution, source, presets=()):
    """Return the tools of `tool_names` as a dict from name to function; presets: those of `notebook --train`."""
    from common.kaggle.download import download_tool  # late: `--help` needs the names only
    from common.kaggle.notebook import notebook_tool
    from common.kaggle.upload import upload_tool

    makers = {"download": download_tool, "upload": upload_tool, "notebook": partial(notebook_tool, presets=presets)}
    return {name: makers[name](solution, source) for name in tool_names(source)}
