"""One finished run of each solution, and the command as a user gives it."""

import os
import shutil

import pytest
import torch
from matplotlib.figure import Figure

from common import recipe
from tests.running import run_command
from tests.solutions.contract import SOLUTIONS, Runs

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt" viewBox="0 0 1 1"></svg>'


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()  # under xdist, the worker's own, in that of the session
    return Runs(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base, tmp_path_factory.mktemp)


@pytest.fixture
def solution(request):
    """The Case of a solution: the contract's parameter, or that of the tests' own folder."""
    return SOLUTIONS[getattr(request, "param", request.path.parent.name)]


@pytest.fixture
def tiny(solution):
    """Options that make the preset demo as small as it can be."""
    return solution.words[1:]


@pytest.fixture
def sample(runs, solution):
    """Folder of a tiny sample, which must not be changed."""
    return runs.sample(solution.name)


@pytest.fixture
def finished(runs, solution):
    """Folder that holds a finished run, `run`, its `stores` and its `submissions`; it must not be changed."""
    return runs.finished(solution.name)


@pytest.fixture
def data(sample, tmp_path):
    """A copy of the sample that may be changed; its files are links: to be replaced, not edited."""
    return shutil.copytree(sample, tmp_path / "data", copy_function=os.link)


@pytest.fixture
def run_copy(finished, tmp_path):
    """A copy of the finished run, in a folder of the test's own."""
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def command(solution, finished, tmp_path, monkeypatch, capsys):
    """`command("train", "--out", …)` in the test's folder: its status, printed text, and lines of standard error.

    Verbs use the finished run's stores. Only the verb `report` makes the page, whose figures are not drawn, since that
    takes longer than all the rest; the page of the finished run has them.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words):
        is_verb = words[0] in ("run", *solution.verbs) and not str((*words, "")[1]).endswith(".csv")
        store = ["--store", finished / "stores"] if is_verb and "--store" not in words else []
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(SVG))
            if words[0] != "report":
                patch.setattr(recipe, "write_report", lambda job, report: None)
            return run_command(capsys, solution.name, *words, *store)

    return run


@pytest.fixture
def refused(command):
    """`refused(*words)`: asserts that the command is refused in one line, and returns the line."""

    def run(*words):
        result = command(*words)
        assert result.status == 2 and len(result.errors) == 1, result
        assert result.errors[0].startswith("error: ")
        return result.errors[0]

    return run
