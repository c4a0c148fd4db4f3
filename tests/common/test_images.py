"""The images of a run: what `prepare` writes, what it refuses, and what makes trainings and predictions stale."""

import shutil
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest

from common.data.store import prepare_store
from common.errors import InputError
from common.images import open_images, prepare_images
from common.listing import check_files
from common.options import Options
from tests.toy import TOY, Config, make_job, write_data


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def prepare(data, tmp_path):
    """`prepare(config, **options)`: prepares the run again and returns its Job."""
    jobs = []

    def again(config=None, recipe=TOY, **options):
        while jobs:
            jobs.pop().run.close()
        jobs.append(make_job(tmp_path / "run", config, recipe, **{"data": data} | options))
        prepare_images(jobs[-1], recipe)
        return jobs[-1]

    yield again
    jobs[-1].run.close()


def test_the_table_has_every_image_and_folds_that_share_no_patient(prepare, tmp_path):
    images = prepare().images
    table = images.table
    names = ["image_id", "row", "width", "height", "ok", "patient_id", "split", "bright", "fold"]
    assert list(table.columns) == names and len(table) == 12 and table["ok"].all()
    assert (table[["width", "height"]] == 8).all().all() and images.store.images.shape == (12, 8, 8)
    train = table[table["split"] == "train"]
    assert train.groupby("patient_id")["fold"].nunique().max() == 1 and set(train["fold"]) == {0, 1}
    assert (table.loc[table["split"] == "test", "fold"] == -1).all()
    folds = pd.read_csv(tmp_path / "run" / "folds.csv", comment="#")
    assert folds["image_id"].tolist() == train["image_id"].tolist() and folds["fold"].tolist() == train["fold"].tolist()
    sample = pd.read_csv(tmp_path / "run" / "sample_submission.csv")
    assert sample["id"].tolist() == ["i08", "i09", "i10", "i11"]


def test_rows_by_split_fold_and_column(prepare):
    images = prepare().images
    assert sorted([*images.rows(folds=[0]), *images.rows(folds=[1])]) == images.rows().tolist() == list(range(8))
    assert images.rows("test").tolist() == [8, 9, 10, 11] and images.rows(bright=1).tolist() == [2, 3, 6, 7]
    assert images.ids([3, 1]).tolist() == ["i03", "i01"] and images.rows_of(["i03", "i01"]).tolist() == [3, 1]
    assert images.groups([0, 1, 2]).tolist() == ["p0", "p0", "p1"] and images.groups([8, 9]).tolist() == [0, 1]
    assert images.patients([8]) is None and images.named([9])["image_id"].tolist() == ["i09"]
    with pytest.raises(InputError, match="other: not an image of this run"):
        images.rows_of(["i01", "other"])


def test_reopened_images_are_the_same(prepare):
    job = prepare()
    again = open_images(job)
    assert again.table.equals(job.images.table)
    assert (again.key, again.pixels_key) == (job.images.key, job.images.pixels_key)


def rewrite(path, value):
    cv2.imwrite(str(path), np.full((8, 8), value, np.uint8))


def test_keys_follow_labels_folds_settings_and_pixels(prepare, data, tmp_path):
    def keys(**options):
        images = prepare(**options).images
        return images.key, images.pixels_key

    first = keys()
    folds = pd.read_csv(tmp_path / "run" / "folds.csv", comment="#")[["image_id", "fold"]]
    folds.assign(fold=1 - folds["fold"]).to_csv(tmp_path / "swapped.csv", index=False)
    assert keys(fold_table=tmp_path / "swapped.csv")[0] != first[0]
    assert keys(config=Config(seed=1))[0] != first[0]
    labels = (data / "labels.csv").read_text()
    (data / "labels.csv").write_text(labels.replace("i00,0", "i00,1"))
    assert keys()[0] != first[0]
    (data / "labels.csv").write_text(labels)
    assert keys() == first
    rewrite(data / "i11.png", 7)  # a test image
    assert keys()[0] == first[0] and keys()[1] != first[1]
    rewrite(data / "i01.png", 7)
    assert keys()[0] != first[0]


def unstratified(job):
    return replace(TOY.read(job), strata=None)


def test_other_data_are_refused_under_a_training(prepare, data, tmp_path):
    rewrite(data / "i01.png", 6)
    shutil.copytree(data, other := tmp_path / "other")
    rewrite(other / "i00.png", 9)
    prepare()
    (tmp_path / "run" / "fold0" / "net").mkdir(parents=True)
    (tmp_path / "run" / "fold0" / "net" / "last.ckpt").touch()
    prepare()  # the same
    for options, said in (
        ({"halve_jpeg2000": True}, "decoded without --halve"),
        ({"data": other}, "other pixels of i00"),
        ({"config": Config(store_size=9), "recipe": replace(TOY, read=unstratified)}, "or settings of `prepare`"),
    ):
        with pytest.raises(InputError, match=f"fold0/net: was trained on .*{said}"):
            prepare(**options)
    assert len([*(tmp_path / "stores").iterdir()]) == 1  # nothing else was decoded
    before = (tmp_path / "run" / "images.parquet").read_bytes()
    size = (data / "i01.png").stat().st_size
    rewrite(data / "i01.png", 7)
    assert (data / "i01.png").stat().st_size == size
    with pytest.raises(InputError, match="fold0/net: was trained on other images, labels, folds"):
        prepare()
    assert (tmp_path / "run" / "images.parquet").read_bytes() == before


def test_a_store_rebuilt_from_other_images_is_noticed_by_single_verbs(prepare, data):
    job = prepare()
    rewrite(data / "i01.png", 7)
    prepare_store({path.stem: path for path in sorted(data.glob("*.png"))}, job.images.store.folder, 8, progress=False)
    with pytest.raises(InputError, match="run: training images have changed since `prepare`; run it again"):
        open_images(job)


def test_options_that_differ_from_those_of_prepare_are_named(prepare, data, tmp_path):
    job = prepare()
    (tmp_path / "elsewhere").mkdir()
    for config, options, said in (
        (Config(seed=3), {}, r"prepared with --seed 0, not 3"),
        (Config(n_folds=3), {}, r"prepared with --n-folds 2, not 3"),
        (Config(), {"data": tmp_path / "elsewhere"}, "prepared with another --data"),
        (Config(), {"test": tmp_path / "elsewhere"}, "prepared with another --test"),
    ):
        job.config, job.options = config, replace(job.options, **({"data": data, "test": None} | options))
        with pytest.raises(InputError, match=said):
            open_images(job)
    job.config, job.options = Config(), replace(job.options, data=tmp_path, test=None)  # the folder above
    assert open_images(job)


def test_a_store_that_is_gone_names_the_remedy(prepare, tmp_path):
    job = prepare()
    shutil.rmtree(job.images.store.folder)
    del job.__dict__["images"]
    with pytest.raises(InputError, match=rf"the data were in {tmp_path}/data: run `prepare --data FOLDER` to decode"):
        open_images(job)


def test_damaged_results_of_prepare(prepare, tmp_path):
    job, run = prepare(), tmp_path / "run"
    whole = (run / "images.parquet").read_bytes()
    for content in (b"", whole[:100], b"[]"):
        (run / "images.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"images\.parquet: missing or damaged; run `prepare` again"):
            open_images(job)
    (run / "images.parquet").unlink()
    with pytest.raises(InputError, match="not prepared; run the verb `prepare` first"):
        open_images(job)
    job.run.record("prepare", "key", data="", test=None)
    (run / "images.parquet").write_bytes(whole)
    with pytest.raises(InputError, match="prepared by another version"):
        open_images(job)


def test_folds_of_a_table_that_cannot_be_used(prepare, tmp_path):
    prepare()
    path = tmp_path / "folds.csv"
    folds = pd.read_csv(tmp_path / "run" / "folds.csv", comment="#")[["image_id", "fold"]]
    for table, said in ((folds.assign(fold=0), "has the folds 0, not all"), (folds[1:], "1 images missing")):
        table.to_csv(path, index=False)
        with pytest.raises(InputError, match=said):
            prepare(fold_table=path)


def test_missing_files_are_named_whatever_the_table_is_called(tmp_path):
    with pytest.raises(InputError, match=r"\{0\}\{a\}\.csv: 1 images have no file, the first is a"):
        check_files(["a"], [], {}, tmp_path / "{0}{a}.csv", Options())


def test_what_is_left_out_is_listed(prepare, tmp_path):
    recipe = replace(TOY, read=lambda job: replace(TOY.read(job), left_out=[("i99", "i99.png", "no label")]))
    assert prepare(recipe=recipe).left_out == 1
    assert pd.read_csv(tmp_path / "run" / "left_out.csv")["reason"].tolist() == ["no label"]
    assert prepare().left_out == 0 and not (tmp_path / "run" / "left_out.csv").exists()


def test_unreadable_training_images_are_left_out(prepare, data, tmp_path):
    (data / "i03.png").write_bytes(b"\x89PNG")
    (data / "i09.png").unlink()
    (data / "i09.png").symlink_to("annex/gone")  # as git-annex leaves files that were not fetched
    for how, said in (("error", "2 of 12 images"), ("placeholder", r"1 of 12 images .*i03\.png: not a DICOM")):
        with pytest.raises(InputError, match=said):
            prepare(on_bad_image=how)
    recipe = replace(TOY, read=lambda job: replace(TOY.read(job), tables={"t.csv": TOY.read(job).table[["image_id"]]}))
    for _ in range(2):  # the second time the store is up to date
        job = prepare(recipe=recipe, on_bad_image="skip")
        table = job.images.table.set_index("image_id")
        assert job.left_out == 1 and "i03" not in table.index and len(table) == 11 and not table["ok"]["i09"]
        assert pd.read_csv(tmp_path / "run" / "left_out.csv").to_numpy().tolist() == [
            ["i03", str(data / "i03.png"), "not a DICOM, PNG or JPEG file"]
        ]
        assert "i03" not in pd.read_csv(tmp_path / "run" / "t.csv")["image_id"].tolist()
    assert job.images.rows().tolist() == [0, 1, 2, 4, 5, 6, 7] and job.images.ids([4]).tolist() == ["i04"]
    assert open_images(job).key == job.images.key
    cv2.imwrite(str(data / "i03.png"), np.zeros((8, 8), np.uint8))
    assert prepare(on_bad_image="skip").images.key != job.images.key
    for name in range(8):
        (data / f"i0{name}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the training images can be read; .*i00\.png: empty file"):
        prepare(on_bad_image="skip")


def test_unused_images_are_in_no_fold(prepare):
    def some(job):
        listing = TOY.read(job)
        return replace(
            listing, table=listing.table.assign(used=listing.table["patient_id"] != "p3"), strata=listing.strata[:6]
        )

    table = prepare(recipe=replace(TOY, read=some)).images.table
    assert table.loc[table["patient_id"] == "p3", "fold"].tolist() == [-1, -1] and "used" not in table
