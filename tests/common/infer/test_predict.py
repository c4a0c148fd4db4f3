import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from common.data.loaders import SampleDataset
from common.errors import InputError
from common.infer.predict import predict_masks, predict_probs, write_masks
from common.infer.tta import FLIP, IDENTITY, sigmoid_and_presence
from common.nn.models import segmenter
from common.paths import read_array

OPTIONS = {"device": "cpu", "amp": "fp32", "progress": False}


class Constant(nn.Module):
    """Probability p everywhere, plus nothing: the logit of p for masks."""

    def __init__(self, p):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(float(p)).logit())

    def forward(self, x):
        return self.logit.expand(x.shape)


def presence(output):
    return sigmoid_and_presence(output)[1]


def logit_of_gray(x):
    return (x.float() / 255).logit()


@pytest.fixture
def store(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 64), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    return images, tmp_path / "images.npy", tmp_path / "masks.b2nd"


def test_a_network_that_gives_the_image_back(store):
    images, path, out = store
    rows = [6, 0, 3, 3]
    masks = predict_masks([logit_of_gray], SampleDataset(path, rows=rows), out, batch_size=3, **OPTIONS)
    assert masks.dtype == np.uint8 and masks.shape == (4, 32, 64) and masks.ndim == 3
    np.testing.assert_array_equal(masks[:], images[rows])
    np.testing.assert_array_equal(read_array(out)[:], images[rows])


@pytest.mark.parametrize(
    ("probs", "expected"),
    [((0.25,), 64), ((0.5,), 128), ((0.2, 0.6), 102), ((0.0, 1.0), 128), ((1.0,), 255), ((0.001,), 0), ((0.002,), 1)],
)
def test_the_mean_of_models_in_eighths_of_a_byte(store, probs, expected):
    # 0.25 × 255 = 63.75, 0.5 × 255 = 127.5 (up), (0.2 + 0.6)/2 × 255 = 102, 0.255, 0.51
    images, _, out = store
    models = [Constant(p) for p in probs]
    masks = predict_masks(models, SampleDataset(images, size=(8, 8), rows=[0]), out, **OPTIONS)
    assert masks.shape == (1, 8, 8) and np.unique(masks[:]).tolist() == [expected]


def test_views_are_averaged_and_undone(store):
    images, _, out = store
    masks = predict_masks([logit_of_gray], SampleDataset(images), out, views=(IDENTITY, FLIP), **OPTIONS)
    np.testing.assert_array_equal(masks[:], images)


def test_structures_keep_their_channels(store):
    images, _, out = store

    def three(x):  # the image, its mirror, nothing
        gray = x.float() / 255
        return torch.cat([gray, gray.flip(-1), torch.zeros_like(gray)], 1).logit()

    masks = predict_masks([three], SampleDataset(images, rows=[4, 1]), out, channels=3, batch_size=1, **OPTIONS)
    masks = masks[:]
    assert masks.shape == (2, 3, 32, 64)
    np.testing.assert_array_equal(masks[:, 0], images[[4, 1]])
    np.testing.assert_array_equal(masks[:, 1], images[[4, 1]][:, :, ::-1])
    assert not masks[:, 2].any()
    # a view is undone in every channel: the image is that of the mirror, and the other way round
    both = predict_masks([three], SampleDataset(images, rows=[4]), out, channels=3, views=(IDENTITY, FLIP), **OPTIONS)
    np.testing.assert_array_equal(both[:], masks[:1])
    half = predict_masks(
        [three, lambda x: three(x).flip(1)], SampleDataset(images, rows=[4]), out, channels=3, **OPTIONS
    )
    np.testing.assert_allclose(half[0, 0], images[4] / 2, atol=0.51)
    assert predict_masks([three], SampleDataset(images, size=16, rows=[]), out, channels=3, **OPTIONS).shape == (
        0,
        3,
        16,
        16,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_and_workers_do_not_matter(store, workers):
    _, path, out = store
    torch.manual_seed(0)
    model = segmenter("fpn", "test_resnet", "none", empty_head=True)
    one = predict_masks([model], SampleDataset(path, size=32), out, batch_size=1, **OPTIONS)[:]
    assert not model.training and one.std() > 0
    other = predict_masks([model], SampleDataset(path, size=32), out, batch_size=4, workers=workers, **OPTIONS)
    np.testing.assert_allclose(other[:], one.astype(int), atol=1)
    probs = predict_probs(
        [model], SampleDataset(path, size=32), batch_size=3, activation=presence, workers=workers, **OPTIONS
    )
    with torch.inference_mode():
        resized = predict_probs(
            [lambda x: x.float().flatten(1)], SampleDataset(path, size=32, rows=[2]), activation=lambda x: x, **OPTIONS
        )
        expected = model(torch.tensor(resized).reshape(1, 1, 32, 32))[1].sigmoid()
    assert probs.dtype == np.float32 and probs.shape == (7, 1)
    np.testing.assert_allclose(probs[2], expected[0], rtol=1e-4)


def test_low_precision_stays_near(store):
    _, path, out = store
    torch.manual_seed(0)
    model = segmenter("fpn", "test_resnet", "none")
    full = predict_masks([model], SampleDataset(path, size=32), out, **OPTIONS)[:].astype(int)
    low = predict_masks([model], SampleDataset(path, size=32), out, **{**OPTIONS, "amp": "bf16"})
    assert np.abs(low[:] - full).max() <= 5


def test_classes(store):
    images, path, _ = store
    model = lambda x: torch.stack([x.float().mean((1, 2, 3)) / 255, x.float().amax((1, 2, 3)) / 255], 1)  # noqa: E731
    probs = predict_probs(
        [model, model], SampleDataset(path, rows=[5, 1]), activation=lambda x: x, batch_size=1, **OPTIONS
    )
    chosen = images[[5, 1]] / 255
    np.testing.assert_allclose(probs, np.stack([chosen.mean((1, 2)), chosen.max((1, 2))], 1), rtol=1e-5)


def test_nothing_remains_of_a_failed_prediction(store):
    images, _, out = store
    write_masks(out, (1, 2, 2), [np.ones((1, 2, 2), np.uint8)])

    class Fails(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.float() if self.calls == 1 else x.float() * float("nan")

    with pytest.raises(InputError, match="row 4: the network produced NaN or infinity"):
        predict_masks([Fails()], SampleDataset(images, rows=[1, 4]), out, batch_size=1, **OPTIONS)
    assert [path.name for path in out.parent.iterdir() if "masks" in path.name] == ["masks.b2nd"]
    assert read_array(out).shape == (1, 2, 2)


def test_files_are_indexed_like_arrays_and_small_where_the_images_are_smooth(tmp_path):
    rng = np.random.default_rng(1)
    images = np.zeros((9, 2, 64, 64), np.uint8)
    images[:, :, 20:30, 20:30] = rng.integers(0, 256, (9, 2, 10, 10))
    for suffix in ("npy", "b2nd", "b2nd"):
        maps = write_masks(tmp_path / f"m.{suffix}", images.shape, np.split(images, [2, 3, 7]))
        for at in (3, np.int64(-1), slice(2, 5), [4, 0, 4], (slice(None), 1), (5, 0)):
            np.testing.assert_array_equal(maps[at], images[at])
        assert (len(maps), maps.shape, maps.ndim, maps.dtype) == (9, images.shape, 4, np.uint8)
        assert all((one == image).all() for one, image in zip(maps, images, strict=True))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(maps.__getitem__, list(range(9)) * 20))
        assert all((one == images[k % 9]).all() for k, one in enumerate(found))
    assert (tmp_path / "m.b2nd").stat().st_size < images.nbytes / 8
    written = (tmp_path / "m.b2nd").read_bytes()
    write_masks(tmp_path / "m.b2nd", images.shape, images[:, None])
    assert (tmp_path / "m.b2nd").read_bytes() == written  # however many came at once


def test_a_damaged_image_in_the_middle_is_named(tmp_path):
    images = np.random.default_rng(1).integers(0, 8, (5, 32, 32), np.uint8)
    write_masks(tmp_path / "m.b2nd", images.shape, [images])
    whole = (tmp_path / "m.b2nd").read_bytes()
    errors = 0
    for at in range(200, len(whole), 97):
        (tmp_path / "m.b2nd").write_bytes(whole[:at] + bytes(40) + whole[at + 40 :])
        try:
            read_array(tmp_path / "m.b2nd")[:]
        except InputError as error:
            assert f"{tmp_path / 'm.b2nd'}: damaged array" in str(error) and "\n" not in str(error)
            errors += 1
    assert errors > 5


def test_too_few_images_and_a_full_disk_leave_no_file(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (4, 256, 256), np.uint8)
    with pytest.raises(InputError, match="3 maps instead of 4"):
        write_masks(tmp_path / "m.b2nd", images.shape, [images[:3]])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="is the disk full") as error:
            write_masks(tmp_path / "m.b2nd", images.shape, [images])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "m.b2nd") and not list(tmp_path.iterdir())


def test_no_rows_give_an_empty_file(store):
    images, _, out = store
    assert predict_masks([logit_of_gray], SampleDataset(images, size=16, rows=[]), out, **OPTIONS).shape == (0, 16, 16)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"models": []}, "no model"),
        ({"amp": "fp16"}, "fp16 needs a GPU"),
        ({"out_path": "masks.png"}, "masks.png: mask probabilities go to a .b2nd or .npy file"),
        ({"models": [lambda x: x.float().repeat(1, 2, 1, 1)]}, r"masks \(2, 32, 64\) from the network"),
        ({"channels": 3}, r"masks \(1, 32, 64\) from the network: expected \(3, 32, 64\)"),
    ],
)
def test_unusable_arguments_are_named(store, change, line):
    images, _, out = store
    dataset = SampleDataset(images, rows=[0])
    options = {"models": [logit_of_gray], "dataset": dataset, "out_path": out, **OPTIONS, **change}
    with pytest.raises(InputError, match=line):
        predict_masks(**options)
    assert not out.exists()


def test_memory_does_not_grow_with_the_images(tmp_path):
    images, used = np.zeros((800, 16, 16), np.uint8), []

    def model(x):
        used.append(psutil.Process().memory_info().rss / 2**20)
        return torch.zeros(x.shape)

    predict_masks([model], SampleDataset(images, size=512), tmp_path / "masks.b2nd", batch_size=8, **OPTIONS)
    assert len(used) == 100 and used[-1] < used[5] + 100  # 800 masks of 512 × 512 are 200 MiB; a few batches are held


def test_a_dataset_of_its_own_shape(store):
    images, *_ = store

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            pair = np.stack([images[index], images[6 - index]])
            return torch.from_numpy(pair), index

    def sums(x):  # both planes, and which is which
        return x.float().mean((2, 3))[:, None] / 255

    found = predict_probs([sums], Pairs(), batch_size=2, activation=lambda x: x, **OPTIONS)
    assert found.shape == (3, 1, 2)
    means = images.mean((1, 2)) / 255
    np.testing.assert_allclose(found[:, 0], np.stack([means[:3], means[6:3:-1]], 1), rtol=1e-5)
