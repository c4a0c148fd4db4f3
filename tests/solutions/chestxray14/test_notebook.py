"""From a finished run to the answer of a notebook on Kaggle without network."""

import pytest

from solutions.chestxray14.config import LABELS
from tests.notebooks import round_trip


@pytest.mark.long
def test_the_notebook_gives_the_bytes_of_the_run(finished, sample, tmp_path, monkeypatch):
    pictures = round_trip(
        finished / "run", "chestxray14", {"datasets/nih-chest-xrays/data": sample}, tmp_path, monkeypatch
    )
    assert pictures.count("data:image/jpeg;base64,") == 4
    assert sum(f"{label} 0." in pictures for label in LABELS) >= 3
