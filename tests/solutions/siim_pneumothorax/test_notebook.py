"""From a finished run to the answer of a notebook on Kaggle: its bundle, its packages, its mounts, no network."""

import sys

from solutions.__main__ import main
from tests import notebooks
from tests.solutions.siim_pneumothorax.test_infer import lively  # noqa: F401 - a fixture


def test_the_notebook_gives_the_bytes_of_the_run(lively, sample, tmp_path, monkeypatch):  # noqa: F811
    notebooks.take_no_index(monkeypatch, tmp_path / "index")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    inputs = tmp_path / "input"
    dataset = inputs / "datasets" / "somebody" / "chest-x-rays"
    assert main(["bundle", str(lively), "--out", str(dataset), "--python", python]) == 0
    words = ["notebook", "--run", lively, "--dataset", "somebody/chest-x-rays", "--out", tmp_path / "notebook"]
    assert main(["siim_pneumothorax", *map(str, words)]) == 0
    (inputs / "competitions").mkdir()
    (inputs / "competitions" / "siim-acr-pneumothorax-segmentation").symlink_to(sample)

    machine = notebooks.make_machine(tmp_path / "machine")
    notebook = tmp_path / "notebook" / "inference.ipynb"
    book, working, attempts = notebooks.execute(notebook, machine, tmp_path / "kernel", inputs, [notebooks.WHERE])
    assert attempts == []
    assert [path.name for path in working.iterdir()] == ["submission.csv"]
    assert (working / "submission.csv").read_bytes() == (lively / "submission.csv").read_bytes()
    said = notebooks.printed(book)
    assert "valid submission: " in said and "4 rows" in said
    notebooks.check_where(said, machine)
    pictures = str(book.cells[3].outputs)
    assert pictures.count("data:image/jpeg;base64,") == 4 and "% of the image" in pictures
