"""`masks --onnx-runtime`: the shipped network in ONNX Runtime draws the masks that torch draws."""

import itertools
from types import SimpleNamespace

import cv2
import pytest

from benchmarks.tables import real_data
from common import cli, extras
from common.paths import find_images
from common.phantom import radiograph
from solutions.lung_segmentation import config, segmenter, tools
from solutions.lung_segmentation.segmenter import load_segmenter, read_radiograph


def radiographs(count):
    root = real_data("covid19")
    if root is None:
        return [radiograph.draw(seed, 512).image for seed in range(count)]
    return [read_radiograph(path) for path in itertools.islice(find_images(root / "images").values(), count)]


@pytest.mark.long
def test_the_shipped_network_draws_the_same_masks(caplog, monkeypatch):
    pytest.importorskip("onnxscript", reason="pip install -e '.[onnx]'")
    caplog.set_level("INFO", "common")
    images = radiographs(3)
    wanted = list(load_segmenter(device="cpu", precision="fp32").masks(images))
    lungs = load_segmenter(device="cpu", onnx=True)
    sessions = lungs._models[0]._sessions
    assert len(list(lungs.masks(images))) == 3  # by the faster one, which is named once
    assert sum("lung segmenter: torch " in record.getMessage() for record in caplog.records) == 1
    for session, most in zip(sessions, (5e-4, 2e-3), strict=False):  # the latter in bfloat16
        monkeypatch.setattr(lungs, "_models", [session])
        for a, b in zip(wanted, lungs.masks(images), strict=True):
            assert (a != b).mean() <= most and 0.05 < a.mean() < 0.6


def test_the_option_reaches_the_network_and_needs_the_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras, "is_installed", lambda extra: False)
    cv2.imwrite(str(tmp_path / "a.png"), radiograph.draw(0, 128).image)
    line = ["masks", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--onnx-runtime"]
    assert cli.main("lung_segmentation", config, dict, line, lambda tool: tools.TOOLS) == 2
    assert capsys.readouterr().err == "error: --onnx-runtime needs further packages: pip install -e '.[onnx]'\n"
    asked = []
    monkeypatch.setattr(extras, "is_installed", lambda extra: True)
    monkeypatch.setattr(segmenter, "to_onnx", lambda *given: asked.append(given[1].shape) or b"")
    monkeypatch.setattr(segmenter, "OnnxSession", lambda content, threads: SimpleNamespace(fits=lambda images: False))
    monkeypatch.setattr(segmenter, "OpenVinoSession", lambda content, threads: None)
    assert cli.main("lung_segmentation", config, dict, line, lambda tool: tools.TOOLS) == 0
    assert asked == [(1, 1, 384, 384)] and (tmp_path / "out" / "a.png").is_file()
