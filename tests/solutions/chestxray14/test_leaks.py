"""Weights that have seen test or held-out images: known by name, form, folder or metadata, and refused."""

import dataclasses
import logging

import pandas as pd
import pytest
import torch

from common.paths import write_json
from common.train.checkpoint import save_weights
from solutions.chestxray14 import leaks
from solutions.chestxray14.labels import names_digest
from solutions.chestxray14.leaks import check_run, check_weights, origin
from solutions.chestxray14.pipeline import SOLUTION
from tests.solutions.chestxray14.folders import SMALL, prepare, refusal


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize(
    "name",
    [
        "m-25012018-123527.pth.tar",
        "nih-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt",
        "densenet121-res224-all/model.pt",
        "models--torchxrayvision--densenet121-res224-nih/snapshots/0/model.pt",
    ],
)
def test_public_weights_that_have_seen_the_test_list(name, tmp_path):
    assert "have seen official test images" in refusal(check_weights, str(tmp_path / name), "official")
    check_weights(str(tmp_path / name), "all")


@pytest.mark.parametrize(
    "name",
    ["models--microsoft--rad-dino/snapshots/0/model.bin", "backbone_compatible.safetensors", "eva_x_small_mim.pt"],
)
def test_weights_that_have_seen_images_without_labels_are_a_state_of_their_own(name, said, tmp_path):
    config, table = with_weights(tmp_path / name), image_table([0, 1])
    message = refusal(check_run, config, table)
    assert name in message and "but no labels; --seen-unlabelled allow takes them" in message
    config = dataclasses.replace(config, seen_unlabelled="allow")
    check_run(config, table)
    assert said.messages == leaks.seen_unlabelled(config) and "is unknown" not in said.text
    assert not leaks.seen_unlabelled(with_weights("dinov2_vitb14_pretrain.pth")) and not leaks.seen_unlabelled(SMALL)


def test_weights_by_their_form(tmp_path, said):
    state = {"module.densenet121.features.conv0.weight": torch.zeros(2, 3, 1, 1)}
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar")
    check_weights(str(tmp_path / "model.pth.tar"), "official")
    assert f"{tmp_path / 'model.pth.tar'}: whether these weights have seen the test images is unknown" in said.text
    torch.save(
        {"state_dict": state | {"module.densenet121.classifier.0.weight": torch.zeros(14, 2)}},
        tmp_path / "model.pth.tar",
    )
    assert "it has the form of public CheXNet code" in refusal(check_weights, tmp_path / "model.pth.tar", "official")
    said.clear()
    for name in ("imagenet", "none"):
        check_weights(name, "official")
    for name in ("chex-densenet121-d121-x.pt", "densenet121-res224-chex/model.pt", "absent.safetensors"):
        assert not leaks._public(tmp_path / name)
    assert not said.text


def test_weights_of_a_run(tmp_path, said):
    path = tmp_path / "run" / "fold0" / "whole" / "final.safetensors"
    path.parent.mkdir(parents=True)
    save_weights(path, {"a": torch.zeros(1)})
    config = {"solution": "chestxray14", "split": "official"}
    write_json(tmp_path / "run" / "config.json", config)
    check_weights(str(path), "official")
    assert "is unknown" not in said.text
    write_json(tmp_path / "run" / "config.json", config | {"split": "all"})
    assert "was trained with split all" in refusal(check_weights, str(path), "official")
    check_weights(str(path), "all")
    assert "is unknown" not in said.text
    check_weights(str(path), "all", {"test images": ["c"]})
    assert "is unknown" in said.text  # without its images.parquet
    said.clear()
    images = pd.DataFrame({"image_id": list("abcd"), "split": ["train"] * 3 + ["test"], "fold": [0, 1, 2, -1]})
    images.to_parquet(tmp_path / "run" / "images.parquet")
    check_weights(str(path), "all", {"test images": ["d", "e"], "images that fold 4 holds out": ["a"]})
    for name in ("test images", "images that fold 4 holds out"):
        message = refusal(check_weights, str(path), "all", {name: ["b", "d"]})
        assert message.endswith(f"run was trained on 1 of the {name}, such as b")
    variant = path.parent / "variants" / "ema.safetensors"
    variant.parent.mkdir()
    variant.write_bytes(path.read_bytes())
    assert "such as c" in refusal(check_weights, str(variant), "all", {"x": ["c"]})
    check_weights(str(variant), "all", {"x": ["a"]})
    other = tmp_path / "run" / "own.safetensors"  # of no fold: all training images count
    other.write_bytes(path.read_bytes())
    assert "such as a" in refusal(check_weights, str(other), "all", {"x": ["a"]})
    assert "is unknown" not in said.text
    write_json(tmp_path / "run" / "config.json", {"solution": "siim_pneumothorax"})
    assert "3,833" in refusal(check_weights, str(path), "official")
    write_json(tmp_path / "run" / "config.json", {"solution": "vinbigdata"})
    check_weights(str(path), "official")
    assert "is unknown" in said.text


def image_table(folds, test=("t",)):
    """An image table: the images a, b, … in these folds, then test images."""
    ids = [chr(ord("a") + number) for number in range(len(folds))]
    return pd.DataFrame(
        {
            "image_id": [*ids, *test],
            "split": ["train"] * len(ids) + ["test"] * len(test),
            "fold": [*folds, *[-1] * len(test)],
        }
    )


def with_weights(path, **changes):
    changed = dataclasses.replace(SMALL, whole=dataclasses.replace(SMALL.whole, weights=str(path)), **changes)
    return dataclasses.replace(changed, folds=(0,)) if "folds" not in changes else changed


def test_copied_weights_say_what_they_have_seen(tmp_path, said):
    """A file outside its run's folder has its metadata alone."""
    table, path = image_table([0, 0, 1, 1]), tmp_path / "copy.safetensors"
    about = origin(SMALL, table, 0)
    assert about == {
        "solution": "chestxray14",
        "split": "official",
        "fold": 0,
        "images": 2,
        "names": names_digest(["c", "d"]),
    }
    save_weights(path, {"a": torch.zeros(1)}, trained_on=about)
    check_run(with_weights(path), table)  # of the very images that this run trains on
    assert not said.text
    for config, other in (
        (with_weights(path, folds=(1,)), table),
        (with_weights(path, folds=(0, 1)), table),
        (with_weights(path), image_table([0, 1, 0, 1])),
        (with_weights(path, split="all"), image_table([0, 1, 1, 0], ())),
    ):
        message = refusal(check_run, config, other)
        assert message.startswith(f"{path}: trained on 2 images of ChestX-ray14 other than")
    save_weights(path, {"a": torch.zeros(1)}, trained_on=about | {"split": "all"})
    assert "their run was trained with split all" in refusal(check_run, with_weights(path), table)
    save_weights(path, {"a": torch.zeros(1)}, trained_on="what others write")
    check_run(with_weights(path), table)
    assert "is unknown" in said.text


def test_weights_copied_into_another_run_are_not_taken_for_its_own(tmp_path):
    path = tmp_path / "run" / "fold0" / "whole" / "final.safetensors"
    path.parent.mkdir(parents=True)
    write_json(tmp_path / "run" / "config.json", {"solution": "chestxray14", "split": "official"})
    own, other = image_table([0, 0, 1, 1]), image_table([1, 1, 1, 0])
    own.to_parquet(tmp_path / "run" / "images.parquet")
    save_weights(path, {"a": torch.zeros(1)}, trained_on=origin(SMALL, own, 0))
    check_run(with_weights(path), own)
    assert "2 of the images that fold 1 holds out, such as c" in refusal(
        check_run, with_weights(path, folds=(0, 1)), own
    )
    save_weights(path, {"a": torch.zeros(1)}, trained_on=origin(SMALL, other, 0))
    assert "trained on 3 images of ChestX-ray14 other than" in refusal(check_run, with_weights(path), own)


def test_a_run_refuses_such_weights(job, tmp_path):
    """Those that have seen test images before anything is decoded, those of held-out images before training."""
    first = prepare(job(out="first"))
    held = first.table.loc[first.table["fold"] == 0, "image_id"].tolist()
    job(out="first").run.write_config("chestxray14", "demo", SMALL)
    path = tmp_path / "first" / "fold1" / "whole" / "final.safetensors"
    path.parent.mkdir(parents=True)
    save_weights(path, {"a": torch.zeros(1)}, trained_on=origin(SMALL, first.table, 1))
    second = job(with_weights(path), out="second")
    prepare(second)
    message = refusal(SOLUTION.before_training, second)
    assert f"was trained on {len(held)} of the images that fold 0 holds out, such as {held[0]}" in message
    second = job(with_weights(path, folds=(1,)), out="second")
    SOLUTION.before_training(second)
    job(out="first").run.write_config("chestxray14", "demo", dataclasses.replace(SMALL, split="all"))
    other = job(with_weights(path, folds=(1,)), out="other", store=tmp_path / "fresh")
    assert "was trained with split all" in refusal(prepare, other) and not (tmp_path / "fresh").exists()
