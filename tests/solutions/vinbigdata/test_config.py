"""The paper's numbers where its preset has them, and what a configuration refuses."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest

from common.blend import with_one_detector
from common.config import FitConfig
from common.errors import InputError
from common.paths import check_id
from solutions.vinbigdata.config import DEMO, PAPER, PODIUM, Config, classes_of, member_parts
from solutions.vinbigdata.pipeline import healthy_network, networks


def values(config, names):
    return {name: getattr(config, name) for name in names.split()}


def test_the_paper_preset_has_the_papers_numbers():
    detector = values(PAPER.detector, "architecture backbone healthy batch_size lr nms per_image optimizer")
    assert detector == {
        "architecture": "faster_rcnn",
        "backbone": "resnet101",
        "healthy": 0.0,
        "batch_size": 4,
        "lr": 1e-3,
        "nms": 0.8,
        "per_image": 100,
        "optimizer": "sgd",
    }
    iterations = PAPER.detector.epochs * (4394 * (PAPER.n_folds - 1) / PAPER.n_folds) / PAPER.detector.batch_size
    assert iterations == pytest.approx(10_000, rel=0.05) and 15_000 / PAPER.n_folds == 750
    assert values(PAPER.healthy, "backbone size epochs") == {"backbone": "resnet18", "size": 256, "epochs": 15}
    assert PAPER.healthy_trained == (0, 1, 2, 3, 4) and PAPER.folds == (0,)
    library = values(PAPER.detector, "default_mapper min_score warmup clip_norm metric")
    assert list(library.values()) == [True, 0, 0.1, 0, "map_coco"]
    assert len(PAPER.members) == 6 and PAPER.fusion.weights == (5, 2, 1, 1, 1, 1) and PAPER.fusion.iou == (0.4,)
    assert (PAPER.decision.rule, PAPER.decision.alpha, PAPER.decision.beta) == (("replace",), (0.997,), (0.3,))


def test_specialists_name_their_classes():
    assert classes_of("flip") == () and classes_of("aortic=fcos-flip@96") == (0,)
    assert classes_of("nodule+ild+pleural-t=flip") == (8, 5, 11)
    assert member_parts("nodule+ild=fcos-flip@96.random", DEMO.detector) == ("fcos", "flip", "96", "random")
    both = dataclasses.replace(DEMO, members=("flip", "aortic=retinanet-flip"))
    assert both.detector_of("aortic=retinanet-flip").architecture == "retinanet"
    check_id("fold0-nodule+ild=fcos-flip@96.random.safetensors", "")
    for names in ("", "pleural", "heart", "aortic+", "no-finding"):
        with pytest.raises(InputError, match="must name one class by its beginning"):
            Config(members=(f"{names}=flip",))


def test_a_blend_is_weighed_by_all_classes_even_if_its_first_detector_is_a_specialist():
    blended = with_one_detector(dataclasses.replace(DEMO, members=("aortic=flip@96", "noise")))
    assert blended.members == ("flip@96",) == with_one_detector(blended).members
    assert with_one_detector(FitConfig()) == FitConfig()


def test_members_may_have_another_architecture():
    fcos = dataclasses.replace(PAPER.detector, architecture="fcos", size=512)
    assert member_parts("flip", fcos) == ("fcos", "flip", 512, "")
    assert member_parts("retinanet-both_no_rotation", fcos) == ("retinanet", "both_no_rotation", 512, "")
    assert member_parts("retinanet-none@768.lungs", fcos) == ("retinanet", "none", "768", "lungs")
    several = dataclasses.replace(PODIUM, members=("podium", "fcos-podium@768", "faster_rcnn_v2-podium.coco"))
    sizes, backbones = zip(*((d.size, d.backbone) for d in map(several.detector_of, several.members)), strict=True)
    assert sizes == (1024, 768, 1024) and backbones == (PODIUM.detector.backbone,) * 2 + ("resnet50",)
    assert several.detector_of(several.members[2]).weights == "coco"
    assert PAPER.detector_of("none.random") == dataclasses.replace(PAPER.detector, weights="none")
    lungs = dataclasses.replace(PAPER, members=("none", "none.lungs"))
    assert lungs.needs_lungs and not PAPER.needs_lungs
    assert [lungs.detector_of(member).lung_channel for member in lungs.members] == [False, True]
    assert PODIUM.detector_of("fcos-podium") == dataclasses.replace(PODIUM.detector, architecture="fcos")
    for member in ("yolo-flip", "flip-fcos", "fcos-", "blur", "none.", "none.heart"):
        with pytest.raises(InputError, match=re.escape(f"member '{member}': must be an augmentation")):
            Config(members=(member,))


@pytest.mark.parametrize("folds", [1, 3, -5])
def test_folds_of_the_classifier_part_those_of_the_detectors(folds):
    with pytest.raises(InputError, match="healthy_folds must be 0, or at least 2 and a divisor of n_folds 20"):
        Config(healthy_folds=folds)


def test_an_export_can_hold_every_training():
    config = Config(members=("none.lungs", "fcos-both_no_rotation@768.random"), healthy_more=("resnet34.a1_in1k",))
    stages = {network.stage for network in networks(SimpleNamespace(config=config))}
    assert {check_id(f"fold0-{stage}.safetensors", "file") for stage in stages} and len(stages) == 4


def test_each_further_classifier_has_a_backbone_of_its_own():
    assert Config(healthy_more=("resnet34",)).healthy_backbones == ("resnet18", "resnet34")
    with pytest.raises(InputError, match="each backbone once, none resnet18"):
        Config(healthy_more=("resnet18",))


class Rows:
    """Twenty images, image i in fold i mod 10."""

    def rows(self, folds):
        return np.flatnonzero(np.isin(np.arange(20) % 10, list(folds)))


def test_no_classifier_has_seen_the_images_that_it_predicts_out_of_fold():
    def rows_of(config, fold):
        network = healthy_network(config, fold, "resnet18")
        return network.rows(SimpleNamespace(images=Rows(), config=config), network.fold)

    paper = dataclasses.replace(PAPER, n_folds=10)
    for fold in range(10):
        train, held_out = rows_of(paper, fold % paper.healthy_modulus)
        assert set(Rows().rows([fold])) <= set(held_out) and not set(train) & set(held_out)
        assert len(train) == 16 and len(held_out) == 4
    assert set(rows_of(dataclasses.replace(DEMO, n_folds=10), 1)[1]) == set(Rows().rows([1]))


def test_what_a_run_trains():
    def stages(config):
        return [(network.fold, network.stage) for network in networks(SimpleNamespace(config=config))]

    assert stages(DEMO) == [(fold, stage) for fold in (0, 1) for stage in ("flip", "noise", "healthy")]
    one = dataclasses.replace(PAPER, members=("flip",), folds=(7,))
    assert stages(one) == [(7, "flip"), *((fold, "healthy") for fold in range(5))]
