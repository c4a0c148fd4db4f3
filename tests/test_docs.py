"""The documentation's site builds without a broken link, and the examples in docstrings give what they say."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (path for package in ("common", "solutions") for path in sorted((ROOT / package).rglob("*.py")))
EXAMPLES = [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried


def test_the_most_used_functions_have_an_example():
    text = "".join(path.read_text(encoding="utf-8") for path in EXAMPLES)
    for name in ("encode", "decode", "read_entries", "mean_boxes", "make_folds", "load_segmenter", "auroc"):
        assert f">>> {name}(" in text or f"= {name}(" in text, name


def build(folder, config=ROOT / "mkdocs.yml"):
    """Build the site; return the process."""
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--config-file",
        config,
        "--site-dir",
        folder,
    ]
    return subprocess.run(words, capture_output=True, text=True)


def test_the_site_builds_and_its_reference_has_every_module(tmp_path):
    pytest.importorskip("mkdocs")
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "api").rglob("*.html"))
    for path in sorted((ROOT / "common").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert path.name == "__init__.py" or f'id="{name}"' in pages, f"docs/hooks.py lacks {name}"
    start = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="solutions/covid19/"' in start and 'href="CONTRIBUTING/"' in start
