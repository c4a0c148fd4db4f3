"""ONNX files: the preprocessing inside, any batch size, equality with torch, and the choice by measurement."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from common import extras
from common.errors import InputError
from common.nn import models, onnx

pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="pip install -e '.[onnx]'")


class Sum(nn.Module):
    """Two logits of a 2 × 2 image that can be worked out by hand."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.layer, self.seconds = nn.Linear(4, 2), seconds
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [1, -1, 0, 0]]))
            self.layer.bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, images):
        if self.seconds:
            time.sleep(self.seconds)
        return self.layer(images.flatten(1))


def network(seconds=0.0):
    return models.Normalised(Sum(seconds), (0.5,), (0.25,)).eval()  # 0 becomes -2, 255 becomes 2


IMAGES = torch.tensor([[[[255, 0], [0, 0]]], [[[255, 255], [255, 255]]], [[[0, 255], [51, 0]]]], dtype=torch.uint8)
LOGITS = [[-3.5, 4.0], [8.5, 0.0], [-2.7, -4.0]]


@pytest.fixture(scope="module")
def content():
    return onnx.to_onnx(network(), IMAGES)


def test_raw_images_in_any_number_give_the_logits(content):
    session = onnx.OnnxSession(content)
    for n in (1, 2, 3):
        np.testing.assert_allclose(session(IMAGES[:n]), LOGITS[:n], atol=1e-6)
    assert session.fits(IMAGES) and not session.fits(IMAGES.float()) and not session.fits(IMAGES.tile(1, 1, 2, 1))
    assert onnx.difference(network(), session, IMAGES) <= 1e-6


def test_a_difference_is_relative_to_the_largest_output():
    pair = [lambda images: (torch.tensor([[0.0, 20.0]]), torch.tensor([[0.1]]))]
    pair.append(lambda images: (torch.tensor([[0.5, 20.0]]), torch.tensor([[0.3]])))
    assert onnx.difference(*pair, IMAGES) == pytest.approx(0.2)  # 0.5 of 20, and 0.2 of 1
    pair[1] = lambda images: (torch.tensor([[0.0, 20.0]]), torch.tensor([[torch.nan]]))
    assert not onnx.difference(*pair, IMAGES) <= onnx.TOLERANCE


def test_a_file_that_differs_from_torch_is_refused(tmp_path, content, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "common")
    onnx.write_onnx(tmp_path / "a.onnx", network(), IMAGES)
    assert "a.onnx: equal to torch within " in caplog.text and (tmp_path / "a.onnx").read_bytes()
    other = network()
    other.net.layer.bias.data[0] += 1e-2
    monkeypatch.setattr(onnx, "to_onnx", lambda *_: content)
    with pytest.raises(InputError, match=r"b\.onnx: ONNX Runtime differs from torch by 1\.2e-03, more than 1e-04"):
        onnx.write_onnx(tmp_path / "b.onnx", other, IMAGES)
    assert not (tmp_path / "b.onnx").exists()


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path):
    class Branching(nn.Module):
        def forward(self, images):
            return images.float() if images.sum() > 3 else images.float() + 1

    with pytest.raises(InputError, match=r"^x\.onnx: cannot be exported to ONNX \(") as caught:
        onnx.to_onnx(Branching(), IMAGES, "x.onnx")
    assert "\n" not in str(caught.value)
    (tmp_path / "final.onnx").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"not a usable ONNX file \("):
        onnx.with_session(network(), tmp_path / "final.onnx")


def test_the_faster_one_answers_and_is_named(content, caplog):
    caplog.set_level(logging.INFO, "common")
    session = onnx.OnnxSession(content)
    fast = onnx.Fastest(network(seconds=0.02), session, "fold0/net")
    np.testing.assert_allclose(fast(IMAGES), LOGITS, atol=1e-6)
    assert caplog.text.count("fold0/net: torch ") == 1 and "ONNX Runtime is used" in caplog.text
    fast.net = None  # torch is not called again
    np.testing.assert_allclose(fast(IMAGES[:2]), LOGITS[:2], atol=1e-6)

    class Slow:
        name, limit, fits, made = session.name, session.limit, session.fits, session
        compare = staticmethod(onnx.difference)

        def __call__(self, images):
            time.sleep(0.02)
            return self.made(images)

    slow = onnx.Fastest(network(), Slow(), "fold1/net")
    np.testing.assert_allclose(slow(IMAGES).detach(), LOGITS, atol=1e-6)
    assert "torch is used" in caplog.text and slow._chosen is slow.net


def test_torch_answers_where_the_file_does_not_fit_or_differs(content, caplog):
    caplog.set_level(logging.INFO, "common")
    net = network(seconds=0.02)
    net.net.layer.bias.data[0] += 1
    both = onnx.Fastest(net, onnx.OnnxSession(content), "fold0/net")
    assert both(IMAGES.float())[0, 0].item() == pytest.approx(-2.5) and "used" not in caplog.text
    assert both(IMAGES)[0, 0].item() == pytest.approx(-2.5)
    assert "fold0/net: ONNX Runtime differs by 1.1e-01, torch " in caplog.text and "; torch is used" in caplog.text


def test_openvino_may_change_the_side_of_few_logits(content, caplog):
    pytest.importorskip("openvino", reason="pip install -e '.[openvino]'")
    caplog.set_level(logging.INFO, "common")
    net, session = network(seconds=0.02), onnx.OnnxSession(content)
    vino = onnx.OpenVinoSession(content, threads=2)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(vino, [IMAGES] * 8):
            np.testing.assert_allclose(found, LOGITS, atol=0.02 * np.abs(LOGITS).max())
    assert onnx.share_of_other_signs(net, vino, IMAGES[::2]) == 0
    assert onnx.share_of_other_signs(lambda images: -net(images), vino, IMAGES[::2]) == 1
    session.compare = lambda *_: 1.0  # leaves OpenVINO as the only other one
    fast = onnx.Fastest(net, session, "lungs", vino)
    np.testing.assert_allclose(fast(IMAGES), vino(IMAGES))
    assert "lungs: ONNX Runtime differs by 1.0e+00, torch " in caplog.text and "; OpenVINO is used" in caplog.text
    vino.compare = lambda *_: 1e-3
    other = onnx.Fastest(net, session, "lungs", vino)
    assert other(IMAGES) is not None and other._chosen is net


def test_missing_packages_name_the_install_command(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "common")
    monkeypatch.setitem(extras.EXTRAS, "onnx", ("no_such_package",))
    with pytest.raises(InputError, match=r"^--onnx needs further packages: pip install -e '\.\[onnx\]'$"):
        extras.require_extra("onnx", "--onnx")
    net, path = network(), tmp_path / "fold0" / "net" / "final.onnx"
    assert onnx.with_session(net, path) is net and not caplog.text
    path.parent.mkdir(parents=True)
    path.touch()
    assert onnx.with_session(net, path) is net and "fold0/net: torch is used; ONNX Runtime is missing" in caplog.text
