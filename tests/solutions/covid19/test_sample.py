"""The embedded sample: the layouts of two collections, what must be dropped, and origin that shows only if asked to."""

import csv
import hashlib
from collections import Counter

import cv2
import numpy as np
import pandas as pd
import pytest

from common import phantom
from common.data.dicom import read_image
from common.errors import InputError
from common.paths import find_images
from solutions.covid19 import sample
from solutions.covid19.sample import make_sample

COUNTS = {"n_covid": 7, "n_other": 4, "n_normals": 8, "n_test": 8}
SMALL = {"n_covid": 4, "n_other": 1, "n_normals": 4, "n_test": 4}
SEED = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("covid19") / "sample", **COUNTS, seed=SEED)


@pytest.fixture(scope="module")
def films():
    return sample._plan_films(**COUNTS, seed=SEED)


def table(path, **kwargs):
    return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, **kwargs)


def path_of(folder, film):
    return folder / ("normals/images_001/images" if film.place == "normals" else "images") / film.file_name


def fingerprint(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_layout(folder):
    files = {"hidden_test.csv", "metadata.csv", "sample.json", "sample_submission.csv", "unlabelled_test.csv"}
    assert {path.name for path in folder.iterdir()} == files | {"images", "normals"}
    home, test = table(folder / "metadata.csv"), table(folder / "unlabelled_test.csv")
    listed = [*home["filename"], *test["filename"]]
    assert len(set(listed)) == len(listed) == 7 + 4 + 6 + 1 + 8
    there = {path.name for path in (folder / "images").iterdir()}
    assert there < set(listed) and len(there) == len(listed) - 1  # one file is missing
    normals = table(folder / "normals" / "Data_Entry_2017.csv")
    files = sorted(path.name for path in (folder / "normals/images_001/images").iterdir())
    assert normals["Image Index"].tolist() == files and len(files) == 8 + 3 + 1
    assert len(find_images(folder)) == len(there) + len(files)  # no stem twice


def test_tables_have_the_headers_of_the_real_files(folder):
    with open(folder / "metadata.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert head[:5] == ["patientid", "offset", "sex", "age", "finding"] and len(set(head)) == len(head) == 29
    assert {"view", "modality", "folder", "filename"} < set(head) and {len(line) for line in lines} == {29}
    head, line, *_ = (folder / "normals" / "Data_Entry_2017.csv").read_bytes().split(b"\n")
    columns = b"Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    assert head.startswith(columns)
    assert head.endswith(b",") and line.endswith(b",") and line.count(b",") == head.count(b",") == 11


def test_what_the_selection_must_deal_with_is_there(folder):
    home = table(folder / "metadata.csv")
    assert Counter(home["finding"].str.contains("COVID")) == {True: 7 + 5 + 1, False: 4 + 1}
    assert set(home["finding"]) == {*sample.COVID, *sample.OTHERS, "todo"}
    assert {"60s", "9"} < set(home["age"]) and home["age"].isin(["60s", "9"]).sum() == 2
    assert {"", "L", "Axial", "PA"} < set(home["view"]) and home["view"].isin(["", "L", "Axial"]).sum() == 3
    assert Counter(home["modality"]) == {"X-ray": len(home) - 1, "CT": 1}
    normals = table(folder / "normals" / "Data_Entry_2017.csv")
    assert Counter(normals["Finding Labels"]) == {"No Finding": 11, "Infiltration": 1}
    assert (normals["Patient Age"] == "9").sum() == 1
    assert len(set(home["patientid"]) & set(normals["Patient ID"])) > 2  # other people


def test_patients_keep_their_label_sex_and_split(folder, films):
    people = {}
    for film in films:
        people.setdefault((film.place == "normals", film.patient), []).append(film)
    for group in people.values():
        assert len({film.place for film in group}) == len({film.person for film in group}) == 1
        assert len({film.finding in sample.COVID for film in group}) == len({film.said["sex"] for film in group}) == 1
        assert [film.visit for film in group] == list(range(len(group)))
    assert {len(group) for group in people.values()} == {1, 2, 3}
    home = table(folder / "metadata.csv")
    assert Counter(home["patientid"]).most_common(1)[0][1] > 1


def test_the_hidden_truth_is_that_of_the_test_images(folder, films):
    test, hidden = table(folder / "unlabelled_test.csv"), table(folder / "hidden_test.csv")
    assert test.columns.tolist() == ["filename", "patientid", "view"] and set(test["view"]) <= {"PA", "AP"}
    assert hidden.columns.tolist() == ["filename", "label", "collection"]
    submission = table(folder / "sample_submission.csv")
    assert submission.columns.tolist() == ["filename", "probability"]
    assert test["filename"].tolist() == hidden["filename"].tolist() == submission["filename"].tolist()
    counts = Counter(zip(hidden["label"], hidden["collection"], strict=True))
    assert counts == {("1", sample.HOME): 4, ("0", sample.HOME): 2, ("0", sample.NORMALS): 2}
    drawn = {film.file_name: film.finding for film in films if film.place == "test"}
    assert all(("COVID" in drawn[row.filename]) == (row.label == "1") for row in hidden.itertuples())


def test_images_are_8_bit_of_several_sizes_and_both_formats_in_each_collection(folder, films):
    shapes, formats = set(), set()
    for film in (film for film in films if film.odd not in ("missing", "copy")):
        stored = cv2.imread(str(path_of(folder, film)), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == np.uint8 and stored.ndim == 2 and np.ptp(stored) > 100
        assert np.array_equal(stored, read_image(path_of(folder, film)))
        if not film.odd:
            assert stored.shape[1] in sample.SIDES and 0.85 < stored.shape[0] / stored.shape[1] <= 1
            shapes.add(stored.shape[1])
            formats.add((film.origin, film.file_name[-4:]))
    assert len(shapes) >= 4 and len(formats) == 4


def test_copies_are_their_sources_at_another_size(folder, films):
    copies = [film for film in films if film.odd == "copy"]
    assert [film.place for film in copies] == ["home", "normals"]
    for copy in copies:
        (source,) = (film for film in films if film.number == copy.number and film is not copy)
        assert source.place == "home" and (source.finding in sample.COVID) == (copy.place == "home")
        one, other = (read_image(path_of(folder, film)) for film in (source, copy))
        assert one.shape != other.shape and copy.patient != source.patient
        one, other = (np.float32(cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)) for image in (one, other))
        assert np.abs(one - other).mean() < 4
        strangers = [film for film in films if film.place == "home" and not film.odd and film.person != source.person]
        image = cv2.resize(read_image(path_of(folder, strangers[0])), (128, 128), interpolation=cv2.INTER_AREA)
        assert np.abs(one - image).mean() > 10


def test_a_film_has_lungs_far_too_small_in_each_collection(films):
    wide = [film for film in films if film.odd == "wide"]
    assert [film.origin for film in wide] == [sample.HOME, sample.NORMALS]
    for film in wide:
        image = sample._draw(film, True)
        assert image.shape == (256, 400)
        assert (image > 60).mean() < 0.22  # the whole body; the paper's gate asks for 0.19


def test_ground_glass_is_in_both_lungs_low_and_lateral():
    for seed in range(3):
        film, normal = (phantom.draw(seed, 256, findings) for findings in ((sample.ground_glass,), ()))
        (found,) = film.findings
        change = film.image.astype(int) - normal.image
        both = film.lungs.left | film.lungs.right
        assert not (found.mask & ~both).any() and change[found.mask].mean() > 5
        assert np.abs(change[~cv2.dilate(np.uint8(both), np.ones((7, 7))).astype(bool)]).max() <= 1
        for lung in film.lungs:
            rows, columns = np.nonzero(lung)
            low, lateral = np.nonzero(found.mask & lung)
            assert 0.03 < len(low) / len(rows) < 0.8
            assert low.mean() > rows.mean()
            middle = np.nonzero(both)[1].mean()
            assert np.abs(lateral - middle).mean() > np.abs(columns - middle).mean()


def test_without_the_marker_origin_does_not_show(films):
    film = next(film for film in films if film.finding == "No Finding" and film.place == "home")
    elsewhere = film._replace(origin=sample.NORMALS, place="normals")
    bare = sample._draw(film, False)
    assert np.array_equal(bare, sample._draw(elsewhere, False)) and np.array_equal(bare, sample._draw(elsewhere, True))
    assert not np.array_equal(bare, sample._draw(film, True))


def test_the_marker_is_on_every_film_of_the_first_collection_and_leaves_the_anatomy(films):
    for film in [film for film in films if film.origin == sample.HOME and not film.odd and film.place != "normals"][:3]:
        bare, marked = (np.float32(sample._draw(film, marker)) for marker in (False, True))
        rim = np.ones(bare.shape, bool)
        rim[10:-10, 10:-10] = False
        assert (marked - bare)[rim].mean() > 20
        inside = slice(len(bare) // 4, -len(bare) // 4), slice(len(bare) // 4, -len(bare) // 4)
        assert np.corrcoef(bare[inside].ravel(), marked[inside].ravel())[0, 1] > 0.98


@pytest.mark.parametrize("seed", [0, 1])
def test_collections_are_alike_by_default(seed):
    films = [film for film in sample._plan_films(48, 12, 48, 12, seed) if film.odd in ("", "decade", "blank view")]
    covid = [film for film in films if film.place == "home" and film.finding in sample.COVID]
    others = [film for film in films if film.place == "home" and film.finding not in sample.COVID]
    normals = [film for film in films if film.finding == "No Finding" and film.place == "normals"]
    assert (len(covid), len(others), len(normals)) == (48, 12, 48)
    assert set(Counter(film.finding for film in others).values()) == {4}
    assert len({film.number for film in films}) == len(films)
    tests, others = ({film.person for film in films if (film.place == "test") is yes} for yes in (True, False))
    assert not tests & others
    for group in (covid, normals):
        assert 25 < len({film.person for film in group}) < 45
        said = pd.DataFrame([film.said | {"age": np.nan} if film.odd else film.said for film in group])
        assert 38 < said["age"].mean() < 64 and 0.2 < (said["sex"] == "F").mean() < 0.8
        assert 0.2 < (said["view"] == "AP").mean() < 0.8
        assert 0.25 < np.mean([film.file_name.endswith(".png") for film in group]) < 0.75


def test_bytes_depend_on_the_parameters_alone(tmp_path, monkeypatch):
    one = fingerprint(make_sample(tmp_path / "a", **SMALL, marker=False))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert one == fingerprint(make_sample(tmp_path / "b", **SMALL, marker=False))
    images = [digest for name, digest in one.items() if name.endswith(("png", "jpg"))]
    assert len(set(images)) == len(images) == 4 + 1 + 5 + 1 + 4 + 3 + 1 + 4
    first, second = ({film.number for film in sample._plan_films(**SMALL, seed=seed)} for seed in (0, 1))
    assert not first & second


@pytest.mark.parametrize(
    "name, value",
    [("n_covid", 3), ("n_other", 0), ("n_normals", 3), ("n_test", 3), ("seed", -1), ("n_covid", 4.5), ("marker", 1)],
)
def test_bad_parameters_are_named(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        make_sample(tmp_path / "sample", **SMALL | {name: value})
    assert not list(tmp_path.iterdir())
