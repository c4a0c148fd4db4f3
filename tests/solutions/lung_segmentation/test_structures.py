"""Left, right and heart: masks that are split, and masks that nobody drew."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.data.loaders import UNKNOWN
from common.errors import InputError
from common.metrics.segmentation import dice_from_areas
from solutions.lung_segmentation import models, postprocess
from solutions.lung_segmentation.pairs import find_pairs, read_mask, read_masks
from tests.solutions.lung_segmentation.test_data import lungs, save, touch


def test_a_mask_of_both_lungs_is_split_and_a_heart_that_nobody_drew_is_unknown(tmp_path):
    both = save(tmp_path / "CHNCXR_0001_0_mask.png", lungs())
    masks, _ = read_masks([[both], [both], []], (40, 60))
    assert (masks[0] + masks[1] == (lungs() > 0)).all() and (masks[2] == UNKNOWN).all()
    assert not masks[0][:, :30].any() and not masks[1][:, 30:].any()  # left is the patient's
    one = save(tmp_path / "CHNCXR_0002_0_mask.png", np.where(np.arange(60) < 30, lungs(), 0).astype(np.uint8))
    with pytest.raises(InputError, match=r"CHNCXR_0002_0_mask.png: does not show two"):
        read_masks([[one], [one]], (40, 60))


def test_unknown_masks_take_no_part_in_losses_and_figures():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 8, 8))).float()
    masks = torch.from_numpy(rng.integers(0, 2, (2, 3, 8, 8), np.uint8))
    masks[1, 2] = UNKNOWN
    masks[1, 2, 0] = 0  # a border that augmentation added
    for name in ("bce", "dice"):
        loss = models.mask_loss(name)
        known = [(b, c) for b in (0, 1) for c in (0, 1, 2)][:5]
        parts = [loss(logits[b : b + 1, c : c + 1], masks[b : b + 1, c : c + 1]) for b, c in known]
        assert float(loss(logits, masks)) == pytest.approx(float(sum(parts) / 5), rel=1e-6)
    areas = models.mask_areas(models.mask_loss("dice"), logits, masks).numpy()
    found = models.mask_figures(areas, 8)
    predicted = logits.numpy() > 0
    dice = [
        dice_from_areas((predicted[k] & (masks[k] == 1).numpy()).sum(), predicted[k].sum(), masks[k].sum())
        for k in known
    ]
    assert found["dice"] == pytest.approx(np.mean(dice)) and areas[1, 6:9].tolist() == [0, 0, -1]
    truth = {0: masks[0].numpy(), 1: masks[1].numpy()}
    truth[1][2] = UNKNOWN
    counts = postprocess.measure(truth.get, [0, 1], predicted * np.uint8(255), [postprocess.MaskRule()], "lungs_heart")
    assert counts[1, 0, 3].tolist() == [0, 0, 0, 0] and counts[0, 0, 3, 3] == 64
    table = pd.DataFrame({"dataset": "JSRT", "patient_id": ["a", "b", "c"]})
    without, _ = postprocess.figures(table, counts[[1, 1, 1], 0], "lungs_heart")
    assert "heart" not in without["structures"]  # no image has one
    figures, _ = postprocess.figures(table, counts[[0, 0, 1], 0], "lungs_heart")
    assert [figures["structures"][name]["images"] for name in ("left", "right", "heart")] == [3, 3, 2]


def test_left_and_right_are_united(tmp_path):
    left, right = (save(tmp_path / f"{side}.png", lungs()) for side in ("l", "r"))
    one = lungs()
    one[:, 30:] = 0
    other = lungs()
    other[:, :30] = 0
    save(left, other), save(right, one)
    united, resized = read_masks([[left, right]], (40, 60))
    assert united.shape == (1, 40, 60) and not resized and (united[0] == (lungs() > 0)).all()
    apart, _ = read_masks([[left], [right]], (80, 120))
    assert apart.shape == (2, 80, 120) and not apart[0][:, :58].any() and not apart[1][:, 62:].any()


def test_a_mask_with_a_palette(tmp_path):
    image = Image.fromarray((lungs() > 0).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == (lungs() > 0)).all()


def test_own_images_of_the_same_name_are_paired_below_their_folder(tmp_path):
    names = [f"{kind}/{part}/Viral Pneumonia-1.png" for kind in ("COVID", "Normal") for part in ("images", "masks")]
    touch(tmp_path, *names, "Normal/images/b.png", "Normal/masks/left/b.png", "Normal/masks/right/b.png")
    found = {pair.image_id: pair for pair in find_pairs(tmp_path)}
    assert list(found) == ["COVID/Viral Pneumonia-1", "Normal/Viral Pneumonia-1", "b"]
    for kind in ("COVID", "Normal"):
        pair = found[f"{kind}/Viral Pneumonia-1"]
        assert pair.image.parts[-3] == pair.masks["lungs"].parts[-3] == kind and pair.patient_id == pair.image_id
    assert set(found["b"].masks) == {"left", "right"}


def test_a_jpeg_mask_with_a_hole_is_damaged(tmp_path):
    path = save(tmp_path / "a.jpg", np.kron(lungs((40, 60)), np.ones((8, 8), np.uint8)))
    read_mask(path)
    data = path.read_bytes()
    begin = data.index(b"\xff\xda") + 200
    path.write_bytes(data[:begin] + bytes(300) + data[begin + 300 :])
    with pytest.raises(InputError, match=r"a\.jpg: the mask cannot be read \(.*Corrupt JPEG data"):
        read_mask(path)
