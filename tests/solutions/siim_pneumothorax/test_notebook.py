"""From a finished run to the answer of a notebook on Kaggle without network."""

from solutions.__main__ import main
from tests.notebooks import round_trip
from tests.solutions.siim_pneumothorax.test_infer import lively  # noqa: F401 - a fixture


def test_the_notebook_gives_the_bytes_of_the_run(lively, sample, tmp_path, monkeypatch):  # noqa: F811
    mounted = "competitions/siim-acr-pneumothorax-segmentation"
    pictures = round_trip(lively, "siim_pneumothorax", {mounted: sample}, tmp_path, monkeypatch)
    assert pictures.count("data:image/jpeg;base64,") == 4 and "% of the image" in pictures


def test_a_run_that_is_not_finished_is_not_bundled(run_copy, tmp_path, capsys):
    (run_copy / "tuned.json").unlink()
    assert main(["bundle", str(run_copy), "--out", str(tmp_path / "bundle")]) == 2
    assert "run the verb `tune`" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
