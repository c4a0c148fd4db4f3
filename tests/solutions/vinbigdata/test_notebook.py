"""From a finished run to the answer of a notebook on Kaggle without network."""

import pytest

from tests.notebooks import round_trip


@pytest.mark.long
def test_the_notebook_gives_the_bytes_of_the_run(finished, sample, tmp_path, monkeypatch):
    mounted = "vinbigdata-chest-xray-abnormalities-detection"  # without folders for the kinds of inputs
    pictures = round_trip(finished / "run", "vinbigdata", {mounted: sample}, tmp_path, monkeypatch, "chest-x-rays")
    assert pictures.count("data:image/jpeg;base64,") in range(1, 5) and " 0." in pictures
