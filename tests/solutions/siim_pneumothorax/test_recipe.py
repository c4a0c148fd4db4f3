"""The recipe's own arithmetic: rows to train on, rates over several sizes, and comparisons on hand-made predictions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from common.config import from_dict
from common.data.loaders import SampleDataset
from common.errors import InputError
from common.nn.norms import batch_norms
from common.post.rle import encode
from solutions.siim_pneumothorax import data, experiments
from solutions.siim_pneumothorax.config import DEMO, PAPER, PODIUM, Config, DecisionConfig
from solutions.siim_pneumothorax.pipeline import gate_network, networks, segmenter_networks


class Images:
    """Two folds with one healthy image and one with a pneumothorax each."""

    def __init__(self):
        mask = np.zeros((1024, 1024), np.uint8)
        mask[64:128, 64:128] = 1
        columns = {"row": [0, 1, 2, 3], "fold": [0, 0, 1, 1], "present": [0, 1, 0, 1], "split": "train"}
        self.table = pd.DataFrame(columns | {"rle": ["-1", encode(mask)] * 2})

    def rows(self, folds):
        return np.flatnonzero(self.table["fold"].isin(folds))

    def at(self, rows):
        return self.table.iloc[rows]

    def patients(self, rows):
        return None

    groups = patients


def test_the_positive_rate_slides_once_over_all_sizes():
    config = replace(PODIUM, segmenter=replace(PODIUM.segmenter, epochs=3, finer_epochs=2))
    coarse, fine = (network.config for network in segmenter_networks(config, 0))
    assert coarse.positive_rate == pytest.approx((0.8, 0.6)) and fine.positive_rate == pytest.approx((0.5, 0.4))
    assert (coarse.epochs, fine.epochs, fine.frozen_epochs, fine.lr, fine.batch_size) == (3, 2, 0, 5e-5, 8)
    assert segmenter_networks(DEMO, 0)[0].config.positive_rate == (0.8, 0.4)
    assert segmenter_networks(PAPER, 0)[0].config == PAPER.segmenter


def test_a_positive_rate_takes_all_negatives(monkeypatch):
    job, sampled = SimpleNamespace(config=PAPER, images=Images()), []
    monkeypatch.setattr(data, "sample_negatives", lambda images, rows, per_positive, seed: sampled.append(per_positive))
    for rate in ((), (0.8, 0.22)):
        config = replace(PAPER, segmenter=replace(PAPER.segmenter, positive_rate=rate))
        segmenter_networks(config, 0)[0].rows(job, 0)
    assert sampled == [1, 1, 0, 0]


def test_the_focal_weight_is_that_of_the_sizes_with_a_focal_loss():
    segmenter = replace(PAPER.segmenter, sizes=(256, 512), focal_weight=0.25, finer_loss="lovasz")
    weights = [each.config.focal_weight for each in segmenter_networks(replace(PAPER, segmenter=segmenter), 0)]
    assert weights == [0.25, 1.0]
    with pytest.raises(InputError, match="focal_weight does not apply"):
        replace(segmenter, loss="combo")


def test_the_paper_has_five_cycles_and_configurations_of_earlier_runs_have_one():
    assert PAPER.segmenter.cycles == 5
    assert from_dict(Config, {"segmenter": {"schedule": "plateau"}}).segmenter.cycles == 1


def test_further_segmenters_and_a_last_training_at_the_same_size():
    segmenter = replace(PODIUM.segmenter, sizes=(512, 512), finer_loss="lovasz", finer_frozen_norms=True)
    config = replace(PODIUM, segmenter=segmenter, presence="mean", more_segmenters=("upernet-resnet18",))
    trainings = networks(SimpleNamespace(config=replace(config, folds=(1,))))
    stages = ["classifier", "segmenter-512", "segmenter-512-2", "upernet-resnet18-512", "upernet-resnet18-512-2"]
    assert [network.stage for network in trainings] == stages
    assert [network.config.loss for network in trainings[1:]] == ["combo", "lovasz"] * 2
    model = segmenter_networks(replace(config, segmenter=replace(segmenter, encoder="resnet18", weights="none")), 0)
    assert [any(p.requires_grad for norm in batch_norms(one.build()) for p in norm.parameters()) for one in model] == [
        True,
        False,
    ]
    for changes, said in (
        ({"more_segmenters": ("unet",)}, "an architecture and an encoder"),
        ({"presence": "mean", "segmenter": PAPER.segmenter}, "needs segmenter.presence_head"),
        ({"presence": "none", "decision": DecisionConfig("expected")}, "needs the probability of a mask"),
    ):
        with pytest.raises(InputError, match=said):
            replace(config, **changes)
    with pytest.raises(InputError, match="at most the smallest size"):
        replace(segmenter, crop=544)


def test_crops_are_for_training_only():
    store = np.zeros((4, 128, 128), np.uint8)
    store[:, 8:16, 8:16] = 255  # where the mask of the positives is
    images = Images()
    images.drawn = lambda row, mask: mask
    images.dataset = lambda rows, size, *how, **more: SampleDataset(store, how[1], how[0], size, rows=rows, **more)
    segmenter = replace(DEMO.segmenter, sizes=(128,), crop=64, augmentation="light")
    (network,) = segmenter_networks(replace(DEMO, segmenter=segmenter), 0)
    data = network.dataset(SimpleNamespace(images=images), np.arange(4), True, True)
    seen = [data[1, seed] for seed in range(40)]
    assert {tuple(image.shape) for image, _ in seen} == {(1, 64, 64)} == {tuple(mask.shape) for _, mask in seen}
    assert all(image[mask > 0].float().mean() > 100 for image, mask in seen if mask.sum() > 20)
    assert np.mean([bool(mask.any()) for _, mask in seen]) > 0.7  # a random crop holds it less often
    image, mask = network.dataset(SimpleNamespace(images=images), np.arange(4), False, True)[1]
    assert image.shape == mask.shape == (1, 128, 128)


def test_training_on_positives_alone():
    job = SimpleNamespace(config=DEMO, images=Images())
    config = replace(PAPER, n_folds=2, segmenter=replace(PAPER.segmenter, positives_only=True))
    (network,) = segmenter_networks(config, 0)
    assert [rows.tolist() for rows in network.rows(job, 0)] == [[3], [1]]


def test_weights_of_the_positives():
    gate = gate_network(replace(PAPER.classifier, positive_weight=3.0), 0)
    logits = torch.zeros(2, 1)  # cross-entropy ln 2 each
    assert gate.loss(logits, torch.tensor([[1.0], [0.0]])).item() == pytest.approx(2 * np.log(2))


def test_comparisons_change_one_thing_and_keep_the_gate(tmp_path, monkeypatch):
    maps = np.zeros((4, 128, 128), np.uint8)
    maps[:, 8:16, 8:16] = 255  # the mask of the positives, about 4,050 pixels of 1024 × 1024
    table = pd.DataFrame({"presence": [0.5, 0.9, 0.5, 0.9]})  # a gate of 0.8 is right about all
    monkeypatch.setattr(experiments, "read_predictions", lambda job, name: SimpleNamespace(table=table))
    monkeypatch.setattr(experiments, "_networks", lambda job, kind, name="", **changes: [])
    monkeypatch.setattr(experiments, "_predict_masks", lambda job, networks, variant="window": maps)
    monkeypatch.setattr(experiments, "_predict_gate", lambda job, gates: np.array([0.1, 0.5, 0.1, 0.5]))
    segmenter = replace(DEMO.segmenter, sizes=(128,))
    config = replace(DEMO, segmenter=segmenter, decision=DecisionConfig(gate=(0.2, 0.8)))
    run = SimpleNamespace(path=tmp_path.joinpath)
    (tmp_path / "ablation").mkdir()
    experiments.run_ablation(SimpleNamespace(config=config, images=Images(), run=run))
    dice = pd.read_csv(tmp_path / "ablation.csv").set_index("setting")["dice"]
    base = dice["as the paper chose"]
    assert base == pytest.approx(1, abs=0.01)
    assert dice["without"] == pytest.approx(base - 0.5)  # both healthy images get a mask
    assert dice["classic SWA"] == dice["1750 px at 1024"] == dice["positives alone"] == base
    assert dice["4500 px at 1024"] == 0.5
    assert dice["enrichment"] == 0.5  # a gate of 0.2 would be right about all, but 0.8 is kept
    assert dice["750 px at 512"] == dice["250 px at 512"] == 1  # 64 pixels of 128 × 128 are 1,024 of 512 × 512
    assert "256 px" not in dice  # larger than the stored images
