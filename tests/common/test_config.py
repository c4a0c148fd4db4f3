"""Configurations as JSON and back, and digests."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import BoxConfig, FitConfig, digest, file_hash, from_dict, to_dict, with_smaller_batches
from common.errors import InputError
from solutions.siim_pneumothorax.config import DEMO, PRESETS, Config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = PRESETS[preset]
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_optional_and_nested_values():
    @dataclass(frozen=True)
    class Outer:
        fit: FitConfig
        limit: float | None = None
        sizes: tuple[int, ...] = ()

    outer = Outer(FitConfig(epochs=3), 0.5, (1, 2))
    assert from_dict(Outer, to_dict(outer)) == outer
    assert from_dict(Outer, {"fit": {}}) == Outer(FitConfig())
    assert from_dict(Outer, {"fit": {"lr": 1}, "limit": None}).fit.lr == 1  # JSON may write 1.0 as 1
    with pytest.raises(InputError, match=r"tuned\.json: the field 'fit' is missing"):
        from_dict(Outer, {"limit": 0.1}, "tuned.json")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": 3}, "unknown field 'epoch'"),
        ({"segmenter": {"epoch": 3}}, "file: segmenter: unknown field 'epoch'"),
        ({"segmenter": {"epochs": "3"}}, "segmenter: epochs cannot be '3'"),
        ({"segmenter": {"epochs": True}}, "epochs cannot be True"),
        ({"segmenter": {"loss": "l1"}}, "loss cannot be 'l1'"),
        ({"segmenter": {"sizes": 64}}, "sizes cannot be 64"),
        ({"segmenter": {"sizes": [60]}}, "multiples of 32"),
        ({"segmenter": []}, "expected a JSON object, not []"),
        ([], "expected a JSON object, not []"),
    ],
)
def test_invalid_configurations_are_named(values, said):
    with pytest.raises(InputError, match=r"^file") as error:
        from_dict(Config, values, "file")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": float("nan")}, "lr"),
        ({"batch_size": -1}, "batch_size"),
        ({"frozen_epochs": 21}, "frozen_epochs"),
        ({"averaging": ()}, "averaging"),
        *(({name: -1}, name) for name in ("weight_decay", "momentum", "clip_norm", "ema_decay", "classic_start")),
        ({"factor": -1.0}, "factor"),
        ({"patience": 0}, "patience"),
    ],
)
def test_values_out_of_range(changes, said):
    with pytest.raises(InputError, match=said):
        FitConfig(**changes)


@pytest.mark.parametrize(("name", "value"), [("nms", 1.5), ("min_score", -0.1), ("per_image", 0)])
def test_settings_of_a_detector_out_of_range(name, value):
    with pytest.raises(InputError, match=name):
        BoxConfig(**{name: value})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"segmenter": {"lr": float("inf")}}, "segmenter.lr must be a finite number, not inf"),
        ({"decision": {"gate": [0.5, float("nan")]}}, "decision.gate must be a finite number, not nan"),
        ({"seed": 10**22}, "below 2^62"),
    ],
)
def test_impossible_numbers_are_named(values, said):
    with pytest.raises(InputError) as error:
        from_dict(Config, values, "file")
    assert said in str(error.value)


def test_digest():
    assert digest(DEMO) == digest(dataclasses.replace(DEMO))
    others = [dataclasses.replace(DEMO, seed=1), dataclasses.replace(DEMO, tta=("flip",)), PRESETS["paper"]]
    assert len({digest(config) for config in (DEMO, *others)}) == 4
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(["a", "b"]) != digest(["b", "a"]) != digest("b", "a") == digest(["b"][0], Path("a"))
    assert len(digest(None)) == 16


def test_file_hash(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(range(256)) * 9000)
    assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_smaller_batches_are_accumulated_to_as_many_images():
    found = with_smaller_batches(DEMO, segmenter=4)
    before, after = DEMO.segmenter, found.segmenter
    assert (after.batch_size, after.accumulate) == (before.batch_size // 4, 4)
    assert found.classifier == DEMO.classifier
