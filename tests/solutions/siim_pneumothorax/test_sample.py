"""The embedded sample: the competition's layout to the byte, repeatable, and never half there."""

import csv
import hashlib
from collections import Counter
from functools import partial

import numpy as np
import pydicom
import pytest

from common.data.dicom import read_image_and_header
from common.errors import InputError
from common.paths import check_id, find_images
from common.phantom import draw
from common.phantom.findings import pneumothorax
from solutions.siim_pneumothorax import sample
from solutions.siim_pneumothorax.sample import make_sample

N_TRAIN, N_TEST, SEED = 20, 4, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("siim") / "sample", N_TRAIN, N_TEST, SEED)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


def painted(text):
    """The competition's form, decoded the slow way: starts count from the end of the run before."""
    flat, position = np.zeros(1024 * 1024, bool), 0
    numbers = [int(number) for number in text.split()]
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        flat[position + gap : position + gap + length] = True
        position += gap + length
    return flat.reshape(1024, 1024).T


def fingerprint(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def test_layout(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "dicom-images-test",
        "dicom-images-train",
        "hidden",
        "nih_id.csv",
        "sample.json",
        "sample_submission.csv",
        "train-rle.csv",
    ]
    assert (folder / "train-rle.csv").read_bytes().startswith(b"ImageId, EncodedPixels\r\n")
    assert (folder / "sample_submission.csv").read_bytes().startswith(b"ImageId,EncodedPixels\r\n")
    assert (folder / "nih_id.csv").read_bytes().startswith(b"Kaggle_ID,NIH_ID,patient_id\r\n")
    train, test = (find_images(folder / f"dicom-images-{split}") for split in ("train", "test"))
    assert len(train) == N_TRAIN and len(test) == N_TEST and not set(train) & set(test)
    assert set(train) == {image_id for image_id, _ in rows(folder / "train-rle.csv")}
    assert set(test) == {image_id for image_id, _ in rows(folder / "hidden" / "truth.csv")}
    assert sorted(rows(folder / "sample_submission.csv")) == sorted([image_id, "-1"] for image_id in test)
    for image_id, path in (train | test).items():
        check_id(image_id, "sample")
        assert pydicom.uid.UID(image_id).is_valid and image_id.startswith("2.25.")
        study, series = path.parent.parent.name, path.parent.name
        assert len({study, series, image_id}) == 3
        header = pydicom.dcmread(path, stop_before_pixels=True)
        assert (header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID) == (study, series, image_id)


def test_images_are_read_and_both_kinds_of_storage_occur(folder):
    syntaxes, people = Counter(), set()
    for path in find_images(folder).values():
        image, header = read_image_and_header(path)
        assert image.shape == (1024, 1024) and image.dtype == np.uint8 and image.std() > 20
        raw = pydicom.dcmread(path, stop_before_pixels=True)
        syntaxes[raw.file_meta.TransferSyntaxUID.name] += 1
        people.add(header["patient_id"])
        assert raw.Modality == "CR" and raw.BodyPartExamined == "CHEST" and raw.ViewPosition in ("PA", "AP")
        assert raw.PatientAge.isdigit() and raw.PatientSex in "FM" and raw.BitsStored == 8
    assert syntaxes == {"JPEG Baseline (Process 1)": 23, "Explicit VR Little Endian": 1}
    assert len(people) == N_TRAIN + N_TEST  # the patient is known from nih_id.csv alone


def test_masks_are_the_findings_drawn(folder):
    table = rows(folder / "train-rle.csv")
    order = list(dict.fromkeys(image_id for image_id, _ in table))
    for image_id, case in zip(order, sample._plan("train", N_TRAIN, SEED), strict=True):
        texts = [text for name, text in table if name == image_id]
        assert all(text.startswith(" ") for text in texts)
        if not case.air:
            assert texts == [" -1"]
            continue
        union = np.any([painted(text) for text in texts], axis=0)
        number, patient = 1_000_000 * SEED + case.number, 100_000 * SEED + case.patient
        ways = [partial(pneumothorax, side=side, share=share, darkness=sample.DARKNESS) for side, share in case.air]
        film = draw(number, 1024, ways, patient=patient)
        truth = np.any([finding.mask for finding in film.findings], axis=0)
        assert not (truth & ~union).any()
        assert case.second_reader or not (union & ~truth).any()


def test_shares_of_positive_bilateral_and_twice_read_images(folder):
    several = {}
    for image_id, text in rows(folder / "train-rle.csv"):
        several.setdefault(image_id, []).append(painted("" if text == " -1" else text))
    assert sum(np.any(masks) for masks in several.values()) == 10  # half of 20
    assert sum(np.sum(masks, axis=0).max() > 1 for masks in several.values()) == 2  # 15 % of 10 overlap
    findings = Counter(len(case.air) for case in sample._plan("train", N_TRAIN, SEED))
    assert findings == {0: 10, 1: 9, 2: 1}  # 10 % of 10 bilateral
    assert any(text != " -1" for _, text in rows(folder / "hidden" / "truth.csv"))


def test_patients_have_several_images_and_keep_to_their_split(folder):
    table = rows(folder / "nih_id.csv")
    assert {image_id for image_id, _, _ in table} == set(find_images(folder / "dicom-images-train"))
    assert len({name for _, name, _ in table}) == N_TRAIN
    assert all(int(name.split("_")[0]) == int(patient) for _, name, patient in table)
    images = Counter(patient for _, _, patient in table)
    assert 1 < max(images.values()) <= 4 and len(images) < N_TRAIN
    train, test = ({case.patient for case in sample._plan(split, 200, SEED)} for split in ("train", "test"))
    assert not train & test


def test_bytes_depend_on_the_parameters_alone(tmp_path):
    one, same, other = (make_sample(tmp_path / name, 4, 1, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert fingerprint(one) == fingerprint(same)
    assert not {digest for _, digest in fingerprint(one)} & {
        digest for name, digest in fingerprint(other) if "dcm" in name
    }


def test_a_complete_sample_is_kept_and_another_replaced(tmp_path, monkeypatch):
    folder = make_sample(tmp_path / "sample", 4, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "_write", None)  # a call would fail
        assert make_sample(folder, 4, 1) == folder
    make_sample(folder, 5, 1)
    assert len(find_images(folder)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_an_interrupted_run_leaves_nothing_or_the_old_sample(tmp_path, monkeypatch):
    def interrupted(folder, seed, case):
        if case.number == 2:
            raise KeyboardInterrupt
        folder.mkdir(exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "_write_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_sample(tmp_path / "sample", 4, 1)
        assert list(tmp_path.iterdir()) == []
    before = fingerprint(make_sample(tmp_path / "sample", 4, 1))
    monkeypatch.setattr(sample, "_write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path / "sample", 5, 1)
    assert fingerprint(tmp_path / "sample") == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something other than a sample"):
        make_sample(tmp_path, 4, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"), [((3, 1, 0), "n_train=3"), ((4, 0, 0), "n_test=0"), ((4, 1, -1), "seed=-1")]
)
def test_bad_parameters_are_named(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        make_sample(tmp_path / "sample", *arguments)
