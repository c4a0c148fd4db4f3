"""What a finished run leaves for others: exported, and then as good as the run itself."""

import os

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file

from common.paths import find_images, read_json
from common.submit.table import read_table, write_submission
from solutions.chestxray14.config import LABELS
from tests.running import run_command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("infer", …)` in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run_command(capsys, "chestxray14", *words)


@pytest.fixture
def unlabelled(sample, tmp_path):
    """NIH's folder with its test list and the test images alone; its files are links: to be replaced, not edited."""
    files, names = find_images(sample), (sample / "test_list.txt").read_text().split()
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in names:
        os.link(files[name.removesuffix(".png")], tmp_path / "data" / "images" / name)
    (tmp_path / "data" / "test_list.txt").write_text("\n".join(reversed(names)))
    return tmp_path / "data"


@pytest.mark.long
def test_an_export_predicts_the_official_test_list_and_what_a_sample_names(
    run_copy, command, refused, unlabelled, tmp_path
):
    assert command("export", "run", "--out", "trained").status == 0
    names = {f"fold{k}-{stage}.safetensors" for k in (0, 1) for stage in ("whole", "lungs", "fusion")}
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {"trained.json", "lungs.safetensors", *names}
    submission = (run_copy / "submission.csv").read_bytes()
    oof, neutral = pd.read_parquet(run_copy / "oof.parquet"), read_json("trained/trained.json")["neutral"]
    assert neutral == {label: pytest.approx(oof[label].mean()) for label in LABELS}
    run_copy.rename(tmp_path / "gone")  # nothing of it is read
    result = command("infer", "trained", "--data", unlabelled, "--workers", "0")
    assert (result.status, result.errors) == (0, []) and "test images from" in result.out
    assert (tmp_path / "submission.csv").read_bytes() == submission
    expected = read_table(tmp_path / "submission.csv")
    first, bad = (unlabelled / "images" / expected["Image Index"][row] for row in (0, 1))
    first.unlink()
    bad.unlink()
    bad.write_bytes(b"no image")
    words = ["infer", "trained", "--workers", "0"]
    assert bad.name in refused(*words, "--data", unlabelled)
    result = command(*words, "--data", unlabelled, "--on-bad-image", "placeholder")
    assert result.status == 4 and "1 of 6 images have no file and are left out" in result.out
    found = read_table(tmp_path / "submission.csv").set_index("Image Index")
    assert found.index.tolist() == expected["Image Index"].tolist()[1:]
    assert found.loc[bad.name].tolist() == [f"{neutral[label]:.6g}" for label in LABELS]
    # what a sample submission names must be there
    write_submission(unlabelled / "sample_submission.csv", expected.iloc[::-1])
    assert "1 test images have no file" in refused(*words, "--data", unlabelled)
    (unlabelled / "sample_submission.csv").unlink()
    (unlabelled / "test_list.txt").unlink()
    assert "no sample_submission.csv or test_list.txt" in refused(*words, "--data", unlabelled)


@pytest.mark.long
def test_a_vision_transformer_trains_from_a_file_of_another_size(command, plain, sample, unlabelled, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", img_size=96).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    own = {"backbone": "vit_tiny_patch16_224", "weights": "vit.safetensors", "resize": "64", "size": "64"}
    own |= {"layer-decay": "0.7", "drop-path": "0.2", "mixup": "0.2", "auc-loss": "0.1"}
    options = [word for name, value in own.items() for word in (f"--whole.{name}", value)]
    words = ["--data", sample, "--out", "run", "--workers", "0", *plain, *options, "--folds", "0", "--tta", "scale"]
    result = command("run", "demo", *words)
    assert result.status == 0 and "vit.safetensors: 150 of 152 tensors loaded, 2 newly initialised (head" in result.out
    assert command("export", "run", "--out", "trained").status == 0
    submission = (tmp_path / "run" / "submission.csv").read_bytes()
    assert command("infer", "trained", "--data", unlabelled, "--workers", "0").status == 0
    assert (tmp_path / "submission.csv").read_bytes() == submission
