"""A trained network from one file: what goes in comes out, in order, at every size, whatever else lies beside it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from benchmarks.tables import real_data
from common import processes
from common.data.folds import make_folds
from common.data.loaders import UNKNOWN
from common.errors import InputError
from common.metrics.segmentation import dice_from_areas
from common.paths import find_images
from common.train.checkpoint import save_weights
from solutions.lung_segmentation import apply_gate, lung_boxes, segmenter
from solutions.lung_segmentation.config import PRESETS, NetworkConfig
from solutions.lung_segmentation.models import build_network
from solutions.lung_segmentation.pairs import find_pairs, read_masks
from solutions.lung_segmentation.segmenter import load_segmenter, read_radiograph, save_segmenter

TINY = NetworkConfig(architecture="plain", encoder="", decoder=(4, 8), weights="none", size=32)
ABOUT = {"network": TINY, "structures": "lungs", "pixel": 0.5, "regions": 0}


class Bright(nn.Module):
    """Channel k finds what is at least 128 + 64 k bright; `tilt` is added along the rows."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 1 / 8))
        self.level = nn.Parameter(127.5 + 64 * torch.arange(channels)[:, None, None])
        self.tilt = nn.Parameter(torch.zeros(1, 1, TINY.size))

    def forward(self, images):
        return (images.float() - self.level) * self.weight + self.tilt


@pytest.fixture
def bright(tmp_path, monkeypatch):
    """`bright(structures, tilt, **changes)`: path of a segmenter whose answers are known."""
    monkeypatch.setattr(segmenter, "build_network", lambda config, channels, weights: Bright(channels))

    def write(structures="lungs", tilt=None, **changes):
        model = Bright({"lungs": 1, "left_right": 2, "lungs_heart": 3}[structures])
        if tilt is not None:
            model.tilt.data[:] = tilt
        save_segmenter(tmp_path / "w.safetensors", model, ABOUT | {"structures": structures} | changes)
        return tmp_path / "w.safetensors"

    return write


def chest(height, width, dark=20, light=230):
    """A dark image with two light rectangles, and their mask."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 8 : 3 * width // 8] = 1
    mask[height // 4 : 3 * height // 4, 5 * width // 8 : 7 * width // 8] = 1
    return np.where(mask, light, dark).astype(np.uint8), mask


def test_a_file_holds_all_that_its_masks_depend_on(tmp_path):
    torch.manual_seed(0)
    model, path = build_network(TINY, 2, "none").eval(), tmp_path / "w.safetensors"
    changes = {"structures": "left_right", "pixel": 0.4, "regions": 2, "command": "x", "n": [1, 2]}
    save_segmenter(path, model, ABOUT | changes)
    kinds = {name: value.dtype for name, value in load_file(path).items()}
    assert kinds["net.last.weight"] == torch.float16 and kinds["net.last.bias"] == torch.float32
    loaded = load_segmenter(path, "cpu", precision="fp32")
    assert (loaded.structures, loaded.size, loaded.pixel, loaded.regions) == (("left", "right"), 32, 0.4, 2)
    assert loaded.about["command"] == "x" and loaded.about["n"] == [1, 2]
    assert loaded.about["network"] == {"architecture": "plain", "encoder": "", "decoder": [4, 8], "size": 32}
    images = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8))
    with torch.no_grad():
        wanted = model(torch.from_numpy(np.stack(images))[:, None]).sigmoid().numpy() * 255
    np.testing.assert_allclose(np.stack(list(loaded.probs(images))), wanted, atol=1.5)


def with_statistics(model):
    """Batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight, part.running_var):
                values.data.uniform_(0.5, 2, generator=generator)
            for values in (part.bias, part.running_mean):
                values.data.normal_(generator=generator)
    return model.eval()


class NormalisesFirst(nn.Module):
    """A convolution whose output is normalised and also goes around the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, images):
        inner = self.conv(images.float() / 255)
        return inner + self.norm(inner)


@pytest.mark.parametrize(
    ("build", "norms"),
    [
        (lambda: build_network(TINY, 2, "none"), 6),
        (lambda: build_network(replace(TINY, architecture="unet", encoder="mobilenetv3_small_050", decoder=()), 1), 44),
        (NormalisesFirst, 0),
    ],
)
def test_convolutions_that_took_their_norms_in_give_the_same(build, norms):
    torch.manual_seed(0)
    model = with_statistics(build())
    folded = segmenter._without_norms(model, 64)
    images = torch.rand(2, 1, 64, 64) * 255
    with torch.no_grad():
        wanted = model(images)
        torch.testing.assert_close(folded(images), wanted, rtol=0, atol=1e-3 * wanted.std().item())
    assert sum("forward" in vars(part) for part in folded.modules()) == norms


def test_the_plain_network_without_norms_is_that_of_table_4():
    model = build_network(replace(PRESETS["unet"].network, architecture="plain_no_norm"), 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_759_521  # as Keras counts its layers
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def test_probabilities_are_those_of_the_stretched_square(bright):
    one = load_segmenter(bright(), "cpu", precision="fp32")
    image = np.full((50, 70), 130, np.uint8)
    (probs,) = one.probs([image])
    assert probs.dtype == np.uint8 and probs.shape == (1, 32, 32)
    assert (probs == int(255 / (1 + np.exp(-2.5 / 8)) + 0.5)).all()  # logit (130 − 127.5) / 8
    halves = np.repeat(np.array([[0, 255]], np.uint8), 64, 1).repeat(128, 0)  # 128 wide, 4 pixels to one
    (probs,) = one.probs([halves])
    assert (probs[0, :, :16] == 0).all() and (probs[0, :, 16:] == 255).all()


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(24, 90), st.integers(24, 90)), max_size=12), batch=st.integers(1, 5))
def test_masks_have_their_images_sizes_and_order(sizes, batch, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenter, "build_network", lambda config, channels, weights: Bright(channels))
        path = tmp_path_factory.mktemp("w") / "w.safetensors"
        save_segmenter(path, Bright(1), ABOUT)
        one = load_segmenter(path, "cpu", batch_size=batch)
    pairs = [chest(*size) for size in sizes]
    found = list(one.masks(image for image, _ in pairs))
    assert len(found) == len(pairs)
    for mask, (_, truth) in zip(found, pairs, strict=True):
        assert mask.dtype == np.uint8 and mask.shape == truth.shape and mask.max() == 1
        assert (mask & truth).sum() > 0.8 * (mask | truth).sum()


def test_the_rule_is_that_of_the_file(bright):
    image, truth = chest(32, 32)
    image[0, 0] = image[16, 8] = 125
    one = load_segmenter(bright(), "cpu", precision="fp32")
    assert (next(one.masks([image])) == (image > 128)).all()
    low = load_segmenter(bright(pixel=0.3), "cpu", precision="fp32")
    assert next(low.masks([image]))[0, 0] == 1
    two = load_segmenter(bright(pixel=0.3, regions=2), "cpu", precision="fp32")
    assert (next(two.masks([image])) == truth).all()  # without the speck
    image[16, 8] = 0
    assert (next(two.masks([image])) == truth).all()  # with the hole filled


def test_lungs_are_united_and_structures_named(bright):
    one = load_segmenter(bright("lungs_heart"), "cpu")
    image = np.zeros((32, 32), np.uint8)
    image[:, 4:12] = 150  # left alone
    image[:, 20:28] = 210  # left and right
    (mask,) = one.masks([image])
    assert (mask == (image > 0)).all()
    parts = one.parts(next(one.probs([image])), image.shape)
    assert list(parts) == ["left", "right", "heart"] == list(one.structures)
    assert (parts["right"] == (image > 200)).all() and not parts["heart"].any()


def test_views_are_averaged(bright):
    tilt = torch.linspace(-3, 3, 32)
    image = np.full((32, 32), 140, np.uint8)
    probs = torch.sigmoid(12.5 / 8 + tilt)
    (found,) = load_segmenter(bright(tilt=tilt), "cpu", tta=("flip",), precision="fp32").probs([image])
    np.testing.assert_allclose(found[0], np.tile((probs + probs.flip(0)) / 2 * 255, (32, 1)), atol=1)
    (alone,) = load_segmenter(bright(tilt=tilt), "cpu", precision="fp32").probs([image])
    np.testing.assert_allclose(alone[0], np.tile(probs * 255, (32, 1)), atol=1)


def test_the_spread_is_that_of_views_and_networks(bright, tmp_path):
    tilt, image = torch.linspace(-3, 3, 32), np.full((32, 32), 140, np.uint8)
    probs = torch.sigmoid(12.5 / 8 + tilt)
    first = bright(tilt=tilt)
    (found,) = load_segmenter(first, "cpu", tta=("flip",), precision="fp32", spread=True).probs([image])
    assert found.shape == (2, 32, 32)
    np.testing.assert_allclose(found[1], np.tile((probs - probs.flip(0)).abs() * 255, (32, 1)), atol=1)
    other = first.rename(tmp_path / "other.safetensors")
    plain = bright()
    (found,) = load_segmenter(plain, "cpu", precision="fp32", more=(other, other), spread=True).probs([image])
    each = torch.stack([torch.sigmoid(torch.full((32,), 12.5 / 8)), probs, probs])
    np.testing.assert_allclose(found[0], np.tile(each.mean(0) * 255, (32, 1)), atol=1)
    np.testing.assert_allclose(found[1], np.tile(each.std(0, correction=0) * 510, (32, 1)), atol=1)
    with pytest.raises(InputError, match=r"the spread needs further views \(--tta\) or networks"):
        load_segmenter(plain, "cpu", spread=True)
    both = bright("left_right")
    with pytest.raises(InputError, match=r"left_right at 32 px, unlike .*other\.safetensors with lungs at 32 px"):
        load_segmenter(other, "cpu", more=(both,))


def test_files_that_cannot_be_used_are_named_and_the_rest_goes_on(bright, tmp_path):
    images = {f"x{n}": chest(40 + n, 60)[0] for n in range(7)}
    files = {name: tmp_path / f"{name}.png" for name in images}
    for name, image in images.items():
        cv2.imwrite(str(files[name]), image)
    files["x1"].write_bytes(files["x1"].read_bytes()[:-20])
    files["x3"] = tmp_path / "nowhere.png"
    rng = np.random.default_rng(0)
    photo = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (64, 64), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(files["x4"]), photo)
    one = load_segmenter(bright(), "cpu", batch_size=2)
    found = list(one.each(files, lambda _, image, probs: (image, one.lungs(probs, image.shape))))
    assert [name for name, *_ in found] == list(files)
    problems = {name: problem for name, _, problem in found if problem}
    assert problems.pop("x1") == f"{files['x1']}: the PNG is cut short"
    assert problems.pop("x3") == f"{files['x3']}: no such file"
    assert problems.pop("x4").startswith(f"{files['x4']}: a colour picture") and not problems
    wanted = dict(zip(images, one.masks(images.values()), strict=True))
    for name, both, problem in found:
        assert (both is None) == bool(problem)
        assert problem or ((both[0] == images[name]).all() and (both[1] == wanted[name]).all())
    with pytest.raises(InputError, match="a colour picture"):
        read_radiograph(files["x4"])


def test_few_images_are_held_at_once_and_threads_are_given_back(bright):
    one, taken = load_segmenter(bright(), "cpu", batch_size=2), []

    def images():
        for number in range(100):
            taken.append(number)
            yield chest(32, 32)[0]

    before = torch.get_num_threads()
    found = one.masks(images())
    next(found)
    assert len(taken) <= 2 * (processes.cores() + 1)
    for _ in range(20):
        next(found)
    assert len(taken) <= 20 + 2 * (processes.cores() + 2)
    found.close()
    assert torch.get_num_threads() == before


def test_what_fails_while_finishing_is_not_swallowed(bright, tmp_path):
    files = {"a": tmp_path / "a.png"}
    cv2.imwrite(str(files["a"]), chest(32, 32)[0])

    def full(image_id, image, probs):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        list(load_segmenter(bright(), "cpu").each(files, full))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4, 3), np.uint8), "uint8 of shape (4, 4, 3)"),
        (np.zeros((4, 4)), "float64 of shape (4, 4)"),
        (np.zeros((0, 4), np.uint8), "uint8 of shape (0, 4)"),
    ],
)
def test_what_is_no_image(image, said, bright):
    with pytest.raises(InputError) as error:
        list(load_segmenter(bright(), "cpu").masks([image]))
    assert str(error.value) == f"an image must be uint8 (H, W), not {said}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"structures": "ribs"}, "structures 'ribs' is not one of lungs, left_right, lungs_heart"),
        ({"network": {"architecture": "plain"}}, "describes no network with architecture, encoder, decoder, size"),
        ({"pixel": "half"}, "pixel cannot be 'half'"),
    ],
)
def test_what_cannot_be_saved(changes, said, tmp_path):
    with pytest.raises(InputError) as error:
        save_segmenter(tmp_path / "w.safetensors", Bright(1), ABOUT | changes)
    assert str(error.value).endswith(said) and not (tmp_path / "w.safetensors").exists()


def test_weights_must_fit_half_precision(tmp_path):
    model = Bright(1)
    model.weight.data[:] = 1e6
    with pytest.raises(InputError, match="weight has values outside the range of half precision"):
        save_segmenter(tmp_path / "w.safetensors", model, ABOUT)


def test_what_cannot_be_loaded(bright, tmp_path, monkeypatch):
    def said(*args, **options):
        with pytest.raises(InputError) as error:
            load_segmenter(*args, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    path, other = bright("left_right"), tmp_path / "other.safetensors"
    assert said(path, tta=("turn",)) == "tta ('turn',): choose from flip and scale"
    assert said(path, batch_size=0) == "batch_size must be at least 1, not 0"
    assert str(other) in said(other)
    other.write_bytes(b"nothing")
    assert "not a safetensors file" in said(other)
    save_weights(other, {"a": torch.zeros(1)}, epoch=3)
    assert "not a lung segmenter of format 1" in said(other)
    about = json.loads(json.dumps(load_segmenter(path, "cpu").about))
    for odd in ({"network": 1}, {"network": about["network"] | {"decoder": 4}}, {"structures": [1]}):
        save_weights(other, {"a": torch.zeros(1)}, **about | odd)
        assert "describes no network" in said(other) or "is not one of" in said(other) or "decoder" in said(other)
    save_weights(other, Bright(3).state_dict(), **about)
    assert "weights of another network" in said(other)
    save_weights(other, {"weight": torch.full((2, 1, 1), torch.nan), **_without(Bright(2), "weight")}, **about)
    with pytest.raises(InputError, match="produced NaN"):
        list(load_segmenter(other, "cpu").masks([chest(32, 32)[0]]))


def _without(model, name):
    return {key: value for key, value in model.state_dict().items() if key != name}


def test_the_shipped_file_is_checked(bright, tmp_path, monkeypatch):
    shipped, pinned = tmp_path / "lungs.safetensors", tmp_path / "lungs.sha256"
    monkeypatch.setattr(segmenter, "SHIPPED", shipped)
    with pytest.raises(InputError, match="the shipped weights are missing"):
        load_segmenter()
    shutil.copy(bright(), shipped)
    digest = subprocess.run(["sha256sum", shipped.name], cwd=tmp_path, capture_output=True, text=True).stdout
    pinned.write_text(digest)
    assert load_segmenter(device="cpu").structures == ("lungs",)
    pinned.write_text("0" + digest[1:] if digest[0] != "0" else "1" + digest[1:])
    with pytest.raises(InputError, match="SHA-256 differs"):
        load_segmenter()


def test_the_shipped_weights_on_real_radiographs():
    assert segmenter.SHIPPED.stat().st_size <= 12 * 2**20
    one = load_segmenter(device="cpu")
    root = real_data("covid19")
    if root is None:
        pytest.skip("no real radiographs (CXR_REAL_DATA)")
    files = dict(list(find_images(root / "images").items())[:40:5])
    found = one.each(files, lambda _, image, probs: apply_gate(one.lungs(probs, image.shape), 0.1))
    verdicts = [verdict for _, verdict, problem in found if not problem]
    assert len(verdicts) == 8 and sum(verdict.ok for verdict in verdicts) >= 7


def test_boxes_and_a_light_import():
    _, mask = chest(256, 256)
    assert lung_boxes([mask, np.zeros((8, 8), np.uint8)]) == [(32 - 15, 64 - 15, 224 + 15, 192 + 20), None]
    light = "import sys, solutions.lung_segmentation as s; assert not {'torch', 'cv2', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{light}; s.lung_region; s.apply_gate; s.clean_up"], check=True)
    with pytest.raises(ImportError):
        from solutions.lung_segmentation import nothing  # noqa: F401


def test_the_shipped_weights_score_what_their_card_says():
    folders = [real_data(name) for name in ("lung_segmentation", "jsrt")]
    if None in folders:
        pytest.skip("CXR_REAL_DATA names no folder with lung_segmentation and jsrt in it")
    pairs = [pair for folder in folders for pair in find_pairs(folder) if pair.files_of("lungs_heart")]
    pairs.sort(key=lambda pair: pair.image_id)
    strata = np.unique([pair.dataset for pair in pairs], return_inverse=True)[1]
    folds = make_folds(strata, 10, [pair.patient_id for pair in pairs], seed=0)
    held_out = {pair.image_id: pair for pair, fold in zip(pairs, folds, strict=True) if fold == 0}
    one, lungs, hearts = load_segmenter(), [], []

    def score(image_id, image, probs):
        true = read_masks(held_out[image_id].files_of("lungs_heart"), image.shape)[0]
        parts = np.stack(list(one.parts(probs, image.shape).values()))
        for found, mask, truth in ((lungs, parts[:2].max(0), true[:2].max(0)), (hearts, parts[2], true[2])):
            if truth[0, 0] != UNKNOWN:
                found.append(float(dice_from_areas((mask & truth).sum(), mask.sum(), truth.sum())))

    assert not any(problem for _, _, problem in one.each({k: pair.image for k, pair in held_out.items()}, score))
    card = one.about["dice"]
    assert len(lungs) == 85 and np.mean(lungs) == pytest.approx(card["all"]["estimate"], abs=0.001)
    assert len(hearts) == 20 and np.mean(hearts) > 0.94 and np.mean(lungs) > 0.965
