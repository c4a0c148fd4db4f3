from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from common.errors import InputError
from common.images import Images
from common.infer.cam import peak, place
from common.post.boxes import BOX
from solutions.chestxray14.config import LABELS, Config, NetworkConfig
from solutions.chestxray14.data import BOX_TABLE, LUNG_TABLE
from solutions.chestxray14.localise import (
    ALL,
    CLASSES,
    PAPER,
    class_table,
    measure,
    other_patients_box,
    paper_column,
    pick_examples,
)
from solutions.chestxray14.maps import Maps, class_maps, from_the_lowest, usable_boxes, view_places
from solutions.chestxray14.models import ChestNet, FusionNet
from solutions.chestxray14.tools import localise


def _boxes(*rows):
    """Rows (patient, label, map, box) as `usable_boxes` returns them; image and row follow from the map."""
    table = pd.DataFrame(
        [(patient, label, k, *box) for patient, label, k, box in rows], columns=["patient_id", "label", "map", *BOX]
    )
    return table.assign(image_id=[f"i{k}" for k in table["map"]], row=table["map"], split="test", fold=-1)


def _whole(cams):
    cams = np.asarray(cams, np.float32)
    return Maps({"whole": cams}, {"whole": np.tile([0.0, 0, 1024, 1024], (len(cams), 1))})


def _square(column, row, cells=16):
    """A map that is 1 in one of cells × cells cells, and that cell's box in the 1024 × 1024 image."""
    cam, side = np.zeros((cells, cells)), 1024 // cells
    cam[row, column] = 1
    return cam, (column * side, row * side, (column + 1) * side, (row + 1) * side)


# ---- maps ----------------------------------------------------------------------------------------------------------


def test_boxes_of_images_that_were_trained_on_are_left_out():
    table = pd.DataFrame({"image_id": list("abcde"), "row": range(5), "patient_id": list("12345")})
    table = table.assign(ok=[True] * 4 + [False], split=["train"] * 3 + ["test"] * 2, fold=[0, 1, 2, -1, -1])
    truth = pd.DataFrame({"image_id": list("aabcde"), "row": [0, 0, 1, 2, 3, 4], "label": [4, 4, 5, 6, 0, 0]})
    truth = truth.assign(x_min=1.0, y_min=2.0, x_max=3.0, y_max=4.0)
    data = SimpleNamespace(table=table, tables={BOX_TABLE: truth})
    usable, left_out = usable_boxes(data, (0, 2))
    assert usable["image_id"].tolist() == ["a", "a", "c", "d"] and left_out == 2
    assert usable["map"].tolist() == [0, 0, 1, 2]  # both boxes of one class share a map
    assert usable["fold"].tolist() == [0, 0, 2, -1]
    data.table["split"] = "train"
    with pytest.raises(InputError, match="6 boxes in all"):
        usable_boxes(data, (9,))


def test_the_seen_part_is_the_centre_of_the_view():
    table = pd.DataFrame({"row": [0, 1], "width": [512, 2048], "height": [512, 1024]})
    lungs = pd.DataFrame({"x_min": [50, 200], "y_min": [60, 100], "x_max": [450, 1800], "y_max": [400, 900]})
    data = Images(table.assign(image_id=["a", "b"]), None, "", "", tables={LUNG_TABLE: lungs})
    config = NetworkConfig(resize=224, size=224)
    assert view_places(data, [1, 0], config, "lungs").tolist() == [[100, 100, 900, 900], [100, 120, 900, 800]]
    assert view_places(data, [1], config, "whole").tolist() == [[0, 0, 1024, 1024]]
    cut = NetworkConfig(resize=256, size=224)
    assert view_places(data, [1], cut, "whole").tolist() == [[64, 64, 960, 960]]
    assert view_places(data, [0], cut, "lungs").tolist() == [[150, 162.5, 850, 757.5]]


def test_weighted_maps_peak_in_the_lung_of_a_cell_at_its_edge():
    cam = np.zeros((1, 4, 4), np.float32) - 5
    cam[0, 1, 0] = -1  # the cell at the left edge, of which the right half is lung
    masks = np.zeros((1, 64, 64), np.uint8)
    masks[0, :, 8:40] = 255
    places = {"whole": np.array([[0.0, 0, 1024, 1024]])}
    bare, cut = Maps({"whole": cam}, places), Maps({"whole": cam}, places, masks=masks)
    assert peak(bare.heat(0)) == (64, 384)  # bilinear stretching is flat left of the cell's centre at 128
    x, y = peak(cut.heat(0))
    assert 128 <= x < 160 and y == 384
    inside = np.s_[:, 8 * 16 + 8 : 40 * 16 - 8]  # beyond half a mask's cell from its edges nothing is changed
    assert np.allclose(
        cut.heat(0)[inside] / cut.heat(0).max(), bare.heat(0)[inside] / bare.heat(0)[inside].max(), atol=1e-5
    )
    assert (cut.heat(0)[:, : 7 * 16] == 0).all() and cut.heat(0).max() == 1


def test_outside_the_lungs_a_map_is_lowest_even_where_all_of_it_is_negative():
    cams = torch.tensor([[[[0.0, -3.0], [-5.0, 0.0]]], [[[1.0, 2.0], [3.0, 4.0]]]])
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, 0, :2, 2:] = 255  # cell (0, 1) is all lung: its evidence is -3
    masks[0, 0, 2, :2] = 255  # cell (1, 0) is half: -5 of its half, so -10, the lowest
    # counted from -10: 7 in the whole cell, 0 in the half one, nothing where no lung is
    assert from_the_lowest(cams, masks).tolist() == [[[[0, 7], [0, 0]]], [[[0, 1], [2, 3]]]]
    # binary: both cells are all lung, so it is counted from -5
    assert from_the_lowest(cams, masks, binary=True)[0].tolist() == [[[0, 2], [0, 0]]]


class _Net(nn.Module):
    """A stand-in for a backbone: the image in 4 × 4 cells, in as many channels as asked for."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Conv2d(3, width, 8, 8)

    def forward(self, images):
        return self.layer(images)


def _job(config, models):
    """A Job on six images, models[fold, stage] standing where the run's weights would be; and the images by stage."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 32, 32), dtype=np.uint8)
    seen = {"whole": pixels, "lungs": 255 - pixels}
    networks = [
        SimpleNamespace(
            fold=fold,
            stage=stage,
            config=getattr(config, stage),
            load=lambda run, model=model: model,
            dataset=lambda job, rows, *_, stage=stage: [(torch.from_numpy(seen[stage][row]), row) for row in rows],
        )
        for (fold, stage), model in models.items()
    ]
    table = pd.DataFrame({"image_id": list("abcdef"), "row": range(6), "width": 1024, "height": 1024})
    lungs = pd.DataFrame({"row": range(6), "x_min": 256, "y_min": 128, "x_max": 768, "y_max": 896})
    images = Images(table, None, "", "", tables={LUNG_TABLE: lungs})
    recipe = SimpleNamespace(networks=lambda job: networks)
    job = SimpleNamespace(config=config, device=torch.device("cpu"), run=None, workers=0, images=images, recipe=recipe)
    return job, {stage: torch.from_numpy(array) for stage, array in seen.items()}


def _network(seed, width=5):
    torch.manual_seed(seed)
    return ChestNet(_Net(width), width, (0.5,) * 3, (0.25,) * 3, 14).eval()


@torch.no_grad()
def test_maps_come_from_networks_that_did_not_see_the_image():
    networks = {(fold, "whole"): _network(fold) for fold in (0, 2)}
    config = Config(whole=NetworkConfig(resize=32, size=32, weights="none"), folds=(0, 2), n_folds=3, store_size=32)
    job, images = _job(config, networks)
    boxes = _boxes(
        ("a", 4, 0, (0, 0, 9, 9)), ("b", 5, 1, (0, 0, 9, 9)), ("b", 6, 2, (0, 0, 9, 9)), ("b", 6, 2, (1, 1, 9, 9))
    )
    boxes = boxes.assign(row=[3, 1, 1, 1], split=["train", "test", "test", "test"], fold=[2, -1, -1, -1])
    found = class_maps(job, boxes)
    expected = {key: model.cam(images["whole"]).numpy() for key, model in networks.items()}
    assert np.allclose(found.cams["whole"][0], expected[2, "whole"][3, 4], atol=1e-5)
    for k, label in ((1, 5), (2, 6)):  # a test image has the mean of the folds' networks
        both = (expected[0, "whole"][1, label] + expected[2, "whole"][1, label]) / 2
        assert np.allclose(found.cams["whole"][k], both, atol=1e-5)
    assert len(found.cams["whole"]) == 3


@torch.no_grad()
def test_fused_maps_are_the_shares_of_the_fused_logit():
    networks = {(0, "whole"): _network(1, 5), (0, "lungs"): _network(2, 7)}
    torch.manual_seed(3)
    fusion = FusionNet(12, 14)
    one = NetworkConfig(resize=32, size=32, weights="none")
    config = Config(views="both", whole=one, lungs=one, folds=(0,), n_folds=2, store_size=32)
    job, images = _job(config, networks | {(0, "fusion"): fusion})
    boxes = _boxes(("a", 4, 0, (0, 0, 9, 9)), ("b", 9, 1, (0, 0, 9, 9))).assign(row=[2, 5])
    found = class_maps(job, boxes)
    pooled = torch.cat([networks[0, stage].pooled(images[stage]) for stage in ("whole", "lungs")], dim=1)
    logits = (fusion(pooled) - fusion.bias)[[2, 5], [4, 9]].numpy()
    assert np.allclose(sum(cams.mean((1, 2)) for cams in found.cams.values()), logits, atol=1e-4)
    assert found.places["lungs"].tolist() == [[256, 128, 768, 896]] * 2 and not found.rescaled
    alone = class_maps(job, boxes, alone=True)
    own = networks[0, "whole"].cam(images["whole"]).numpy()
    assert list(alone.cams) == ["whole"] and np.allclose(alone.cams["whole"][1], own[5, 9], atol=1e-5)
    job.config = replace(config, combine="mean")
    assert not class_maps(job, boxes, alone=True).rescaled
    assert class_maps(job, boxes).rescaled
    heat = found.heat(0)
    assert heat.shape == (1024, 1024) and heat.min() == 0 and heat.max() == 1
    whole, lungs = found.cams["whole"][0], found.cams["lungs"][0]
    raw = {  # outside the crop its map is lowest; its first cell begins at its corner
        (0, 0): whole[0, 0] + lungs.min(),
        (1023, 1023): whole[3, 3] + lungs.min(),
        (128, 256): place(whole, (0, 0, 1024, 1024), (1024, 1024))[128, 256] + lungs[0, 0],
    }
    (low, first), (high, last) = sorted((value, at) for at, value in raw.items())[::2]
    for at, value in raw.items():
        share = (heat[at] - heat[first]) / (heat[last] - heat[first])
        assert share == pytest.approx((value - low) / (high - low), abs=1e-4)


# ---- figures -------------------------------------------------------------------------------------------------------


def test_figures_of_a_box_by_hand():
    cam, box = _square(3, 5)
    # One cell stretched bilinearly: at one half, the region is about the cell, by hand 64 px wide in the middle rows.
    boxes = _boxes(("a", 4, 0, box), ("a", 4, 0, (0, 0, 64, 64)), ("b", 4, 1, box))
    found = measure(boxes, _whole([cam, np.ones((16, 16))]), (0.5,)).boxes
    assert found["found_x_min"][0] == box[0] and found["found_y_max"][0] == box[3] and found["iou"][0] == 1
    assert found["hit"].tolist() == [1, 0, 0]
    assert 0.96 < found["guided_iou"][0] < 1 and found["guided_iou"][1] == 0  # the middle lies between two pixels
    assert found["iou"][1] == 0 and found["threshold"].tolist() == [0.5] * 3
    assert found["iou"][2] == 0 and np.isnan(found["found_x_min"][2])  # a flat map
    # The place of a's boxes is b's box, that of b's the mean of a's two.
    mean = np.mean([box, (0, 0, 64, 64)], axis=0)
    inter = np.prod(np.minimum(mean[2:], box[2:]) - np.maximum(mean[:2], box[:2]).clip(0)) if mean[2] > box[0] else 0
    assert found["place_iou"].tolist() == [1, 0, pytest.approx(inter / (2 * 64 * 64 - inter))]


def test_a_looser_threshold_gives_a_larger_box():
    cam, box = _square(8, 8)
    found = [measure(_boxes(("a", 1, 0, box)), _whole([cam]), (t,)).boxes.loc[0] for t in (0.9, 0.5, 0.1)]
    widths = [each["found_x_max"] - each["found_x_min"] for each in found]
    assert widths == sorted(widths) and widths[0] < 64 == widths[1] < widths[2]
    assert found[1]["iou"] > max(found[0]["iou"], found[2]["iou"])


def test_thresholds_are_chosen_on_the_other_part():
    cam, box = _square(8, 8)
    grown = (box[0] - 27, box[1] - 27, box[2] + 27, box[3] + 27)
    boxes = _boxes(*((patient, 1, k, grown) for k, patient in enumerate("aabb")))
    found = measure(boxes, _whole([cam] * 4), (0.1, 0.5))
    assert found.said == "thresholds 0.1, tuned on the other half of the patients" and (found.boxes["iou"] > 0.9).all()
    assert found.curve.index.tolist() == [0.1, 0.5] and found.curve.is_monotonic_decreasing
    with pytest.raises(InputError, match="one patient"):
        measure(boxes.assign(patient_id="a"), _whole([cam] * 4), (0.1, 0.5))


def test_the_place_of_other_patients():
    boxes = np.array([[0, 0, 2, 2], [0, 0, 4, 4], [2, 2, 4, 4], [9, 9, 10, 10.0]])
    found = other_patients_box(boxes, np.array([1, 1, 1, 2]), np.array(["a", "a", "b", "b"]))
    assert found[:3].tolist() == [[2, 2, 4, 4], [2, 2, 4, 4], [0, 0, 3, 3]] and np.isnan(found[3]).all()


def test_the_table_by_hand():
    boxes = _boxes(*(("abcd"[k], label, k, (0, 0, 9, 9)) for k, label in enumerate((4, 4, 4, 5))))
    boxes = boxes.assign(
        iou=[0.2, 0.4, 0.6, 0.1], hit=[1.0, 0, 1, 0], guided_iou=0.5, place_iou=[0.1, 0.1, 0.1, np.nan]
    )
    table = class_table(boxes, n_resamples=200).set_index("label")
    assert table.index.tolist() == ["Mass", "Nodule", ALL, CLASSES]
    mass, nodule, whole, classes = (table.loc[name] for name in table.index)
    assert mass["iou"] == pytest.approx(0.4) and 0.2 <= mass["low"] < 0.4 < mass["high"] <= 0.6
    assert mass["gain"] == pytest.approx(0.3) and mass["hit"] == pytest.approx(2 / 3)
    assert nodule["iou"] == pytest.approx(0.1) and np.isnan(nodule["low"]) and np.isnan(nodule["place_iou"])
    assert whole["iou"] == pytest.approx(0.325) and whole["boxes"] == 4 and whole["gain"] == pytest.approx(0.3)
    assert classes["iou"] == pytest.approx(0.25) and np.isnan(classes["low"])
    assert "paper" not in table and "fused_gain" not in table
    both = class_table(boxes.assign(whole_iou=[0.1, 0.3, 0.3, 0.3]), n_resamples=200).set_index("label").loc[ALL]
    assert both["whole_iou"] == pytest.approx(0.25) and both["fused_gain"] == pytest.approx((0.1 + 0.1 + 0.3 - 0.2) / 4)
    assert both["fused_gain_low"] < both["fused_gain"] < both["fused_gain_high"] and np.isnan(both["fused_gain_p"])
    more = pd.concat([boxes.assign(whole_iou=0.0), boxes.assign(patient_id=list("efgh"), whole_iou=0.0)])
    assert 0 < class_table(more, n_resamples=200).set_index("label").loc[ALL, "fused_gain_p"] < 0.05
    attention, without = (class_table(boxes, paper, n_resamples=20).set_index("label")["paper"] for paper in (0, 1))
    assert attention["Mass"] == 0.1768 and without[ALL] == 0.2437
    assert np.isnan(without["Mass"]) and np.isnan(attention[CLASSES])


def test_examples_are_chosen_by_the_boxes_alone():
    """The box of median area of each class; scores, and the order of the rows, do not matter."""
    cases = enumerate([(1, 5), (1, 9), (1, 7), (0, 3)])
    boxes = _boxes(*(("a", label, k, (0, 0, side, side)) for k, (label, side) in cases))
    assert pick_examples(boxes).index.tolist() == [3, 2]
    assert pick_examples(boxes[::-1].assign(iou=[0.9, 0.1, 0.5, 0.2])).index.tolist() == [3, 2]


def test_the_papers_figures_are_of_networks_on_whole_images_without_weighting():
    def column(views, attention, weighting):
        return paper_column(Config(views=views, whole=NetworkConfig(attention=attention, weighting=weighting)))

    assert (column("whole", True, False), column("whole", False, False)) == (0, 1)
    assert column("whole", True, True) is column("both", True, False) is column("lungs", False, False) is None


def test_maps_of_two_networks_count_alike_where_no_layer_fuses_them():
    (one, _), (other, _) = _square(3, 3), _square(12, 3)
    cams = {"whole": np.float32(one)[None], "lungs": np.float32(100 * other)[None]}
    places = dict.fromkeys(cams, np.array([[0.0, 0, 1024, 1024]]))
    shares, alike = Maps(cams, places).heat(0), Maps(cams, places, rescaled=True).heat(0)
    assert shares[224, 800] == 1 and shares[224, 224] == pytest.approx(0.01)
    assert alike[224, 800] == pytest.approx(1) and alike[224, 224] == pytest.approx(1) and alike.min() == 0


def test_the_papers_mean_is_that_over_boxes():
    counts = {
        "Atelectasis": 180,
        "Cardiomegaly": 146,
        "Effusion": 153,
        "Infiltration": 123,
        "Mass": 85,
        "Nodule": 79,
        "Pneumonia": 120,
        "Pneumothorax": 98,
    }
    assert sum(counts.values()) == 984 and set(counts) == set(PAPER) - {ALL} <= set(LABELS)
    mean = sum(n * PAPER[name][0] for name, n in counts.items()) / 984
    assert mean == pytest.approx(PAPER[ALL][0], abs=1e-4)


def test_unusable_options_and_folders_are_refused(tmp_path):
    for options, message in (
        ({"threshold": (0.0,)}, "above 0"),
        ({"threshold": (0.5, 1.5)}, "1.5"),
        ({"threshold": ()}, "at least one"),
        ({"boxes": tmp_path / "boxes.csv"}, "name a folder by --out"),
        ({}, "not the folder of a finished"),
    ):
        with pytest.raises(InputError, match=message):
            localise(tmp_path, **options)
    (tmp_path / "config.json").write_text('{"solution": "vinbigdata"}')
    with pytest.raises(InputError, match="not the configuration of a run of chestxray14"):
        localise(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        localise(tmp_path, out=tmp_path / "config.json")


# ---- the tool ------------------------------------------------------------------------------------------------------


def test_a_run_of_both_views_on_the_sample(run_copy, command, refused):
    truth, images = pd.read_parquet(run_copy / "truth_boxes.parquet"), pd.read_parquet(run_copy / "images.parquet")
    done = command("localise", "run", "--threshold", "0.4", "0.6")
    found = pd.read_csv(run_copy / "localisation.csv")
    classes = pd.read_csv(run_copy / "localisation_table.csv").set_index("label")
    assert len(found) == len(truth) == classes.loc[ALL, "boxes"] > 4  # both folds and the test images
    assert set(found["label"]) <= set(LABELS) and found["threshold"].isin((0.4, 0.6)).all()
    assert found[["iou", "guided_iou"]].stack().between(0, 1).all()
    assert f"mean IoU {classes.loc[ALL, 'iou']:.4f}" in done.out and "place alone" in done.out
    assert found["iou"].mean() == pytest.approx(classes.loc[ALL, "iou"])
    tables = [pd.read_parquet(run_copy / f"{name}.parquet").set_index("image_id") for name in ("oof", "test")]
    probs = pd.concat(tables)
    assert found["prob"].tolist() == pytest.approx([probs.at[box.image_id, box.label] for box in found.itertuples()])
    html = (run_copy / "localisation.html").read_text()
    assert html.count("data:image/jpeg") == 3 * found["label"].nunique()  # examples, alone and both, and best ones
    gain = (found["iou"] - found["whole_iou"]).mean()
    assert classes.loc[ALL, "fused_gain"] == pytest.approx(gain) and "whole image's network alone 0." in done.out
    assert ("no better than" in html) == ("no better than" in done.out) == (classes.loc[ALL, "gain"] <= 0)
    assert "its figures are not shown" in html and "paper" not in classes
    assert "Synthetic radiographs" in html and set(images["image_id"]) >= set(found["image_id"])
    command("localise", "run", "--threshold", "0.6", "--out", "more")
    again = pd.read_csv("more/localisation.csv")
    assert (again["threshold"] == 0.6).all() and again["guided_iou"].equals(found["guided_iou"])
    assert "not a folder" in refused("localise", "run", "--out", str(run_copy / "config.json"))
    table = truth.drop(columns="label").assign(**{"class": [LABELS[label] for label in truth["label"]]})[2:]
    table.to_csv("own.csv", index=False)  # in ChestX-Det's form
    command("localise", "run", "--threshold", "0.6", "--boxes", "own.csv", "--out", "own")
    own = pd.read_csv("own/localisation.csv")
    assert len(own) == len(truth) - 2 and set(own["guided_iou"]) <= set(again["guided_iou"])
