"""setup.sh with a stand-in for the environment's Python: what it installs, and how it fails."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
case "$*" in
  *"uv pip install"*"-e ."*) touch .venv/bin/cxr ;;
  *"uv pip install"*) echo "$*" >> calls; printf '%s' "$SAYS"; exit ${FAILS:-0} ;;
  "-m solutions"*) echo "$*" ;;
esac
"""
DF = "#!/bin/sh\necho 'Filesystem 1024-blocks Used Available'; echo \"disk 0 0 $FREE\"\n"


@pytest.fixture
def setup(tmp_path):
    """`setup(*words, **environment)`: the status, the lines of output and of errors of setup.sh in an empty clone."""
    for name in ("setup.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for path, text in ((tmp_path / ".venv/bin/python", PYTHON), (tmp_path / "tools/df", DF)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(*words, free=10**9, **environment):
        environment |= {"PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}", "FREE": str(free)}
        done = subprocess.run(
            ["bash", "setup.sh", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    return run


def test_installs_once_and_says_how_much(setup, tmp_path):
    status, said, errors = setup()
    assert status == 0 and errors == [] and "3.5 GB to download, 6.5 GB on disk" in said[0]
    assert said[-1] == "ready: source .venv/bin/activate, then cxr --help"
    assert any("--cpu" in line for line in said) == (not Path("/proc/driver/nvidia/version").exists())
    assert setup() == (0, said[-1:], [])
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert setup("demo", "there")[1] == ["-m solutions demo there"]


def test_the_smaller_pytorch(setup, tmp_path):
    status, said, _ = setup("--cpu")
    assert status == 0 and "2.5 GB on disk" in said[0] and not any("--cpu" in line for line in said)
    assert (tmp_path / "calls").read_text().endswith(" -r requirements.txt --torch-backend cpu\n")


@pytest.mark.parametrize(
    ("words", "log", "said"),
    [
        (
            (),
            "error: a\n  cause: Failed to fetch: http://x/\n",
            "the package index cannot be reached; nothing was inst",
        ),
        (
            ("--cpu",),
            "dns error",
            "the package index, or PyTorch's index of CPU packages, cannot be reached; nothing was",
        ),
        ((), "error: no space left on device (os error 28)", "the disk is full: the packages need 7 GB"),
        (
            (),
            "\n  × No solution found: torch\nmore\nlines\n",
            "  × No solution found: torch (all messages: .venv/install",
        ),
    ],
)
def test_a_failed_installation_is_one_line(setup, tmp_path, words, log, said):
    status, _, errors = setup(*words, SAYS=log, FAILS="1")
    assert status == 2 and len(errors) == 1 and errors[0].startswith(f"error: {said}")
    assert (tmp_path / ".venv/install.log").read_text() == log
    assert setup(*words)[0] == 0  # nothing was noted as installed


def test_a_full_disk_is_noticed_before_anything_is_installed(setup, tmp_path):
    status, said, errors = setup(free=2_500_000)
    assert (status, said) == (2, [])
    assert errors == [f"error: the packages need 7 GB in {tmp_path}, which has 2 GB left"]
    assert setup("--cpu", free=3_500_000)[0] == 0 and setup(free=0)[0] == 2


@pytest.mark.parametrize("words", [("tests",), ("--cpu", "all")])
def test_other_words_are_refused(setup, words):
    said = [f"error: '{words[-1]}' is not one of: install, demo, test, each also after --cpu"]
    assert setup(*words) == (2, [], said)
