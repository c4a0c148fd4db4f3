"""Loaders: the sampler by hand-counted batches, the dataset by hand-made images, workers and processes by equality."""

import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import processes
from common.data import augment, loaders
from common.data.loaders import EpochSampler, SampleDataset, eval_loader, make_loader, passes, sliding_rate
from common.errors import InputError


class Numbers:
    """A stand-in pipeline that writes its random numbers into the image."""

    def set_random_state(self, generator, python):
        self.generator, self.python = generator, python

    def __call__(self, image, **rest):
        image = image.copy()
        image[:4, :4] = self.generator.integers(256, size=(4, 4))
        image[4:8, :4] = np.reshape([self.python.randrange(256) for _ in range(16)], (4, 4))
        return {"image": image, **rest}


class Thresholds:
    """Targets that a worker can be sent: the mask of the bright pixels of a row."""

    def __init__(self, path):
        self.path = path

    def __call__(self, row):
        return np.load(self.path, mmap_mode="r")[row] > 128


@pytest.fixture
def store(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (23, 48, 48), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "images.npy"


def epochs(sampler, n_epochs, start=0):
    for epoch in range(start, n_epochs):
        sampler.set_epoch(epoch, n_epochs)
        yield list(sampler)


def flat(batches):
    return [key for batch in batches for key in batch]


def collect(loader):
    return [[part.clone() for part in batch] for batch in loader]


def same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the sampler ---------------------------------------------------------------------------------------------------


def test_plain_epoch_is_each_sample_once_in_a_new_order():
    first, second = epochs(EpochSampler(10, 2, seed=3), 2)
    assert [len(batch) for batch in first] == [2] * 5
    orders = [[index for index, _ in flat(batches)] for batches in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]
    assert [flat([pair]) for pair in next(epochs(EpochSampler(10, 4, seed=3), 2))] == [
        flat(first[:2]),
        flat(first[2:4]),
    ]  # an incomplete last batch is left out
    assert next(epochs(EpochSampler(10, 2, seed=4), 1)) != first


def test_seeds_differ_between_places_and_epochs_also_of_one_sample():
    sampler = EpochSampler(6, 3, seed=0, positives=[1, 0, 0, 0, 0, 0], positive_rate=lambda _: 0.5, draws=300)
    keys = [key for batches in epochs(sampler, 3) for key in flat(batches)]
    assert len({seed for _, seed in keys}) == len(keys) == 900
    assert sum(index == 0 for index, _ in keys) == 450


def test_rate_slides_and_every_run_of_samples_keeps_it():
    positives = np.arange(100) % 5 == 0
    sampler = EpochSampler(100, 7, 1, positives, sliding_rate(0.8, 0.4), draws=105)
    shares = []
    for epoch, batches in enumerate(epochs(sampler, 5)):
        rate = 0.8 - 0.1 * epoch
        chosen = positives[[index for index, _ in flat(batches)]].astype(int)
        shares.append(chosen.mean())
        for length in (1, 2, 7, 14, 50):
            runs = np.convolve(chosen, np.ones(length), "valid")
            assert np.abs(runs - rate * length).max() < 1 + 1e-9
    assert shares == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4], abs=0.5 / 105 + 1e-9)


def test_rate_of_one_epoch_is_the_first_and_the_extremes_hold():
    labels = [0, 1, 0, 1]
    sampler = EpochSampler(4, 2, 0, labels, sliding_rate(1.0, 0.0))
    assert {index for index, _ in flat(list(sampler))} == {1, 3}
    *_, last = epochs(sampler, 4)
    assert {index for index, _ in flat(last)} == {0, 2}


def test_each_class_is_exhausted_before_it_is_reshuffled():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    sampler = EpochSampler(11, 4, 5, labels, sliding_rate(0.75, 0.25), draws=12)
    drawn = [index for batches in epochs(sampler, 9) for index, _ in flat(batches)]
    for label, size in ((1, 3), (0, 8)):
        members = [index for index in drawn if labels[index] == label]
        assert len(members) > 5 * size
        for start in range(0, len(members) - size + 1, size):
            assert sorted(members[start : start + size]) == np.flatnonzero(labels == label).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 40), st.integers(0, 40))
def test_passes_are_windows_of_one_endless_sequence(n, start, count):
    members = np.arange(n) * 3
    assert np.array_equal(passes(members, start, count, 9), passes(members, 0, start + count, 9)[start:])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(12, 60), st.integers(0, 4), st.booleans())
def test_two_or_three_processes_together_see_the_batches_of_one(per_rank, n, epoch, with_rate):
    rate = {"positives": np.arange(n) % 3 == 0, "positive_rate": sliding_rate()} if with_rate else {}
    for world in (2, 3):
        parts = [EpochSampler(n, per_rank * world, 8, rank=rank, world=world, **rate) for rank in range(world)]
        whole = EpochSampler(n, per_rank * world, 8, **rate)
        for sampler in (*parts, whole):
            sampler.set_epoch(epoch, 5)
        joined = [flat(shares) for shares in zip(*parts, strict=True)]
        assert joined == list(whole)
        assert all(len(share) == per_rank for part in parts for share in part)


def test_start_batch_continues_and_len_counts_what_is_left():
    sampler = EpochSampler(20, 4, 2)
    sampler.set_epoch(1, 3)
    whole = list(sampler)
    assert len(sampler) == len(whole) == 5
    sampler.start_batch = 3
    assert list(sampler) == whole[3:]
    assert len(sampler) == 2
    sampler.set_epoch(1, 3)
    assert list(sampler) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 13}, "larger than the 12 samples"),
        ({"batch_size": 5, "world": 2}, "batch_size 5 has no equal part"),
        ({"positive_rate": sliding_rate(), "positives": [0] * 12}, "0 positives of 12"),
        ({"positive_rate": sliding_rate(), "positives": [1] * 12}, "12 positives of 12"),
        ({"positive_rate": lambda _: 1.2, "positives": [0, 1] * 6}, "positive rate 1.2"),
    ],
)
def test_impossible_arguments_of_the_sampler(arguments, message):
    with pytest.raises(InputError, match=message):
        EpochSampler(**{"n": 12, "batch_size": 4, "seed": 0, **arguments})


def test_impossible_epochs_are_refused_at_once():
    sampler = EpochSampler(4, 2, 0, [0, 0, 1, 1], lambda fraction: 0.5 + fraction)
    with pytest.raises(InputError, match=r"positive rate 1\.5"):  # that would be the third epoch's
        sampler.set_epoch(0, 3)


# ---- the dataset ---------------------------------------------------------------------------------------------------


def test_items_by_hand(store):
    images = np.load(store)
    dataset = SampleDataset(store, rows=[4, 2, 2])
    image, target = dataset[1]
    assert image.dtype == torch.uint8 and image.shape == (1, 48, 48) and target == 2
    assert np.array_equal(image[0].numpy(), images[2])
    image[:] = 0  # an item is a copy: writing to it leaves the store alone
    assert np.array_equal(dataset[2, None][0][0].numpy(), images[2])
    vector = SampleDataset(images, lambda row: [row, 0.5])[3][1]
    assert vector.dtype == torch.float32 and vector.tolist() == [3, 0.5]
    scalar = SampleDataset(images, images[:, 0, 0].__getitem__)[3][1]
    assert scalar.dtype == torch.float32 and scalar.shape == () and scalar == images[3, 0, 0]


def test_images_shrink_by_area_and_masks_are_cut_at_one_half():
    images = np.zeros((1, 4, 4), np.uint8)
    images[0, :2, :2] = [[10, 20], [30, 40]]
    mask = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    image, target = SampleDataset(images, lambda _: mask, size=2)[0]
    assert image[0].tolist() == [[25, 0], [0, 0]]
    assert target.dtype == torch.uint8 and target.tolist() == [[[1, 0], [1, 0]]]  # two of four pixels are one half
    image, target = SampleDataset(images, lambda _: mask.astype(bool), size=(8, 6))[0]
    assert image.shape == target.shape == (1, 8, 6) and set(target.unique().tolist()) == {0, 1}


def test_masks_of_several_structures_keep_their_channels(store):
    images = np.zeros((1, 4, 4), np.uint8)
    images[0, :, :2] = 200
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, :, :2], masks[1, :2], masks[2, 3, 3] = 1, 1, 1
    for target in (masks, masks.astype(bool)):
        small = SampleDataset(images, lambda _, target=target: target, size=2)[0][1]
        assert small.dtype == torch.uint8
        assert small.tolist() == [[[1, 0], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]  # a quarter is under one half
    whole = SampleDataset(images, lambda _: masks)[0][1]
    assert whole.shape == (3, 4, 4) and np.array_equal(whole, masks)
    flip = augment.A.Compose([augment.A.HorizontalFlip(p=1.0)])
    image, flipped = SampleDataset(images, lambda _: masks, flip)[0, 5]
    assert np.array_equal(flipped, masks[:, :, ::-1]) and np.array_equal(image[0], images[0][:, ::-1])
    bright = SampleDataset(store, lambda row: np.stack([np.load(store)[row] > 128] * 2), augment.light(p=1.0), 32)
    batch = next(iter(eval_loader(bright, 4)))[1]
    assert batch.shape == (4, 2, 32, 32) and torch.equal(batch[:, 0], batch[:, 1])
    moved = [bright[3, seed][1] for seed in range(8)]
    assert all(torch.equal(one, other) for one, other in moved) and len({part.numpy().tobytes() for part in moved}) > 1


def test_a_sample_follows_its_seed_alone(store):
    dataset = SampleDataset(store, Thresholds(store), augment.light(p=1.0))
    first = dataset[5, 17]
    others = [dataset[5, seed] for seed in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(first, dataset[5, 17], strict=True))
    assert len({other[0].numpy().tobytes() for other in others}) == 5
    assert torch.equal(dataset[5][0][0], torch.from_numpy(np.load(store)[5]))  # without a seed: as it is


def test_steps_of_one_pipeline_draw_independently(store):
    """Two flips at one half give each of the four orientations a quarter, not both flips or neither."""
    flips = augment.A.Compose([augment.A.HorizontalFlip(p=0.5), augment.A.VerticalFlip(p=0.5)])
    dataset = SampleDataset(np.arange(4, dtype=np.uint8).reshape(1, 2, 2), transform=flips)
    got = [tuple(dataset[0, seed][0].flatten().tolist()) for seed in range(800)]
    counts = [got.count(order) for order in ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))]
    assert sum(counts) == 800 and min(counts) > 150


def test_kinds_choose_the_pipeline(store):
    images = np.load(store)
    flip, turn = (augment.A.Compose([step(p=1.0)]) for step in (augment.A.HorizontalFlip, augment.A.VerticalFlip))
    dataset = SampleDataset(images, transform=[flip, turn], rows=[3, 3, 3], kinds=[-1, 0, 1])
    got = [dataset[i, 0][0][0].numpy() for i in range(3)]
    for image, expected in zip(got, (images[3], images[3][:, ::-1], images[3][::-1]), strict=True):
        assert np.array_equal(image, expected)


def test_a_mapped_store_is_not_copied_into_a_worker(store):
    mapped = np.load(store, mmap_mode="r")
    for images in (store, str(store), mapped):
        sent = pickle.dumps(SampleDataset(images))
        assert len(sent) < 2000 < mapped.nbytes
        assert np.array_equal(pickle.loads(sent)[7][0], SampleDataset(store)[7][0])
    assert len(pickle.dumps(SampleDataset(np.array(mapped)))) > mapped.nbytes


def test_errors_of_the_dataset(store, tmp_path):
    images = np.zeros((2, 8, 8), np.uint8)
    (tmp_path / "bad.npy").write_text("no array")
    np.save(tmp_path / "float.npy", np.zeros((2, 8, 8)))
    for make, message in (
        (lambda: SampleDataset(tmp_path / "none.npy"), "none.npy"),
        (lambda: SampleDataset(tmp_path / "bad.npy"), "bad.npy"),
        (lambda: SampleDataset(tmp_path / "float.npy"), "float.npy: expected uint8"),
        (lambda: SampleDataset(images[0]), "images: expected uint8"),
        (lambda: SampleDataset(np.load(store, mmap_mode="r")[3:]), "images.npy: a slice"),
        (lambda: SampleDataset(images, transform=augment.podium_siim(4, rare=1.0))[0, 1], "must keep the size"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


# ---- workers, resumes, processes -----------------------------------------------------------------------------------


def test_batches_are_the_same_for_any_workers_and_after_a_resume(store):
    def loader(workers):
        labels = np.arange(23) % 4 == 0
        dataset = SampleDataset(store, Thresholds(store), augment.podium_siim(32, rare=0.8), size=32)
        return make_loader(dataset, EpochSampler(23, 4, 6, labels, sliding_rate()), workers, seed=1)

    alone, helped = loader(0), loader(2)
    runs = []
    for epoch in range(2):
        for one in (alone, helped):
            one.batch_sampler.set_epoch(epoch, 2)
        runs.append(collect(alone))
        same(runs[-1], collect(helped))
        assert len(runs[-1]) == len(alone) == 5
    images, masks = runs[0][0]
    assert images.dtype == masks.dtype == torch.uint8 and images.shape == masks.shape == (4, 1, 32, 32)

    helped.batch_sampler.set_epoch(0, 2)
    next(iter(helped))  # an abandoned epoch leaves nothing behind in the workers
    for resumed in (helped, loader(0)):
        resumed.batch_sampler.set_epoch(1, 2)
        resumed.batch_sampler.start_batch = 3
        same(collect(resumed), runs[1][3:])


def test_workers_do_not_repeat_each_others_numbers(store):
    dataset = SampleDataset(store, transform=Numbers(), rows=np.zeros(40, int))
    loader = make_loader(dataset, EpochSampler(40, 2, 0), workers=2)
    before = torch.get_rng_state()
    images = torch.cat([images for images, _ in loader])
    assert torch.equal(before, torch.get_rng_state())  # the training's own random numbers are left alone
    assert len({image[0, :4, :4].numpy().tobytes() for image in images}) == 40  # numpy's
    assert len({image[0, 4:8, :4].numpy().tobytes() for image in images}) == 40  # Python's


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_ordered_complete_and_unaugmented(store, workers):
    images = np.load(store)
    dataset = SampleDataset(store, transform=Numbers())
    batches = collect(eval_loader(dataset, 5, workers))
    assert [len(part) for part, _ in batches] == [5, 5, 5, 5, 3]
    assert np.array_equal(torch.cat([part for part, _ in batches])[:, 0].numpy(), images)
    (chosen, rows), *_ = eval_loader(dataset, 5, workers, indices=np.array([9, 1]))
    assert np.array_equal(chosen[:, 0], images[[9, 1]]) and rows.tolist() == [9, 1]


@pytest.mark.parametrize(
    ("cores", "memory", "shm", "here", "expected", "scarce"),
    [
        (8, 10**10, 10**9, 1, 6, ""),
        (4, 10**10, 10**9, 1, 4, "cores"),
        (8, 16 * 10**8, 10**9, 1, 5, "memory"),
        (8, 10**10, 64 * 10**6, 1, 4, "/dev/shm"),  # Docker's, for batches of 4 MB, each worker with four of them
        (8, 10**10, 64 * 10**6, 2, 2, "/dev/shm"),  # shared by two trainings
        (2, 10**10, 10**9, 4, 1, "cores"),
        (8, 10**10, 10**6, 1, 0, "/dev/shm"),  # this process reads
    ],
)
def test_workers_are_as_many_as_the_machine_bears(monkeypatch, caplog, cores, memory, shm, here, expected, scarce):
    monkeypatch.setattr(processes, "cores", lambda: cores)
    monkeypatch.setattr(processes, "free_memory", lambda: memory)
    monkeypatch.setattr(processes, "count_here", lambda: here)
    monkeypatch.setattr(loaders.os.path, "isdir", lambda path: path == "/dev/shm")
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda path: SimpleNamespace(free=shm))
    caplog.set_level(logging.INFO)
    loaders._say_once.cache_clear()
    assert [loaders.affordable_workers(6, 4_000_000) for _ in range(2)] == [expected] * 2
    said = [f"{expected} instead of 6 processes read images, for lack of {scarce}"] * (expected < 6)
    assert caplog.messages == said


def test_a_loader_asks_for_its_images_and_as_much_for_targets(store, monkeypatch):
    asked = []
    monkeypatch.setattr(loaders, "affordable_workers", lambda *of: asked.append(of) or 0)
    dataset = SampleDataset(store, size=16)
    make_loader(dataset, EpochSampler(len(dataset), 4, 0), workers=3)
    eval_loader(dataset, 5, workers=2)
    eval_loader(dataset, 5, workers=2, indices=[])
    assert asked == [(3, 2 * 4 * 256), (2, 2 * 5 * 256), (2, 0)]
