"""What every solution promises of changes: exactly what follows from them is stale, and no page shows a stale score."""

import os
import re
import shutil

import pytest

from common.config import file_hash
from common.paths import read_json, read_parquet, write_csv
from common.submit.table import read_table
from common.train.checkpoint import load_weights, save_weights
from tests.running import hash_files, write_times
from tests.solutions.contract import MOSTLY_LONG, edit_image, find_image

pytestmark = pytest.mark.parametrize("solution", MOSTLY_LONG, indirect=True)
AFTER = {"predict": ("tune", "score", "submit"), "tune": ("score", "submit")}
SCORE = "0.731928"


@pytest.fixture
def marked(solution, run_copy):
    """The finished run with a score that appears nowhere else."""
    path, manifest = run_copy / "score.json", run_copy / "manifest.json"
    before, text = file_hash(path), path.read_text()
    estimate = re.search(rf'^  "{solution.recipe.metric}": {{\s*"estimate": ([\d.e-]+)', text, re.MULTILINE)[1]
    path.write_text(text.replace(estimate, SCORE))
    manifest.write_text(manifest.read_text().replace(before, file_hash(path)))
    return run_copy


@pytest.fixture
def page(marked, command):
    """`page(*words)`: the report as text, without plots."""

    def draw(*words):
        result = command("report", "--out", "run", *words)
        assert (result.status, result.errors) == (0, []), result
        return re.sub(r"\s+", " ", (marked / "report.html").read_text())

    return draw


@pytest.fixture
def check_stale(page, refused):
    """`check_stale(verb, *words)`: whatever needs the verb is refused and names it, and the page has no score."""

    def check(verb, *words):
        for later in AFTER[verb]:
            line = refused(later, "--out", "run", *words)
            assert re.search(rf"`{verb}` is out of date( \(--.* was .*, now .*\))?; run the verb `{verb}`", line), later
        text = page(*words)
        assert SCORE[:5] not in text and "out of date" in text

    return check


def test_the_page_of_a_finished_run_has_its_score(solution, page):
    assert SCORE[:5] in page()


def test_other_views(solution, marked, command, check_stale, sample):
    weights, words = write_times(marked, "fold*/*/*"), solution.views.split()
    before = hash_files(marked)
    check_stale("predict", *words)
    result = command("run", "--data", sample, "--out", "run", *words)
    assert result.status == 0 and "up to date" not in re.sub(".*stores.*", "", result.out)
    assert write_times(marked, "fold*/*/*") == weights
    changed = {name for name, digest in hash_files(marked).items() if before.get(name) != digest}
    assert {"oof.parquet", "oof_probs.b2nd"} & changed and {"manifest.json", "config.json"} <= changed


def test_another_decision(solution, marked, command, check_stale, sample):
    if not solution.decision:
        pytest.skip("the decision has no settings")
    kept, words = ("fold*/*/*", "oof.parquet", "test.parquet", "*_probs.b2nd"), solution.decision.split()
    done = write_times(marked, *kept)
    check_stale("tune", *words)
    result = command("run", "--data", sample, "--out", "run", *words)
    assert result.status == 0 and "predict: up to date" in result.out and "tune: up to date" not in result.out
    assert done == write_times(marked, *kept)


def test_replaced_weights(solution, marked, command, refused, check_stale, sample):
    path = max(marked.glob("fold1/*/final.safetensors"), key=os.path.getmtime)  # from which no other one starts
    state, about = load_weights(path)
    save_weights(path, {name: 1.01 * t if t.is_floating_point() else t for name, t in state.items()}, **about)
    check_stale("predict")
    assert "`predict` is out of date" in refused("export", "run", "--out", "trained")
    result = command("run", "--data", sample, "--out", "run")
    assert result.status == 0 and "epoch" not in result.out and "predict: up to date" not in result.out


def test_another_training_is_refused_and_loses_nothing(solution, run_copy, command, refused, sample):
    before = hash_files(run_copy, but=["manifest.json"])
    for option in (solution.training, "--n-folds 3", "--seed 1"):
        line = refused("run", "--data", sample, "--out", "run", *option.split())
        assert "run/fold0/" in line and "another" in line and "--out" in line, option
        assert hash_files(run_copy, but=["manifest.json"]) == before, option
    again = command("run", "--data", sample, "--out", "run")
    assert again.status == 0 and "epoch" not in again.out and "predict: up to date" in again.out


@pytest.mark.parametrize("option", ["--n-folds 3", "--seed 1", "--store-size 96"])
def test_options_of_prepare(option, solution, run_copy, refused):
    option = option.replace("96", "128")
    for verb in ("train", "predict", "tune", "submit"):
        assert f"prepared with {option.split()[0]}" in refused(verb, "--out", "run", *option.split())


def test_changed_training_data(solution, run_copy, command, refused, data, sample, tmp_path):
    """A label, an image and the folds: refused while there are trainings of the old ones, and then trained again."""
    assert command("prepare", "--data", data, "--out", "run").status == 0  # the same data in another place
    before = hash_files(run_copy, but=["manifest.json"])
    assert "tune: up to date" in command("tune", "--out", "run").out
    table = read_parquet(run_copy / "images.parquet")
    train = table[(table["split"] == "train") & (table["fold"] >= 0)]
    swapped = train[["image_id"]].assign(fold=1 - train["fold"])
    write_csv(tmp_path / "folds.csv", swapped)
    changes = [("label", []), ("image", []), ("folds", ["--fold-table", "folds.csv"])]
    for what, words in changes:
        other = shutil.copytree(sample, tmp_path / what, copy_function=os.link)
        if what == "label":
            solution.relabel(other)
        if what == "image":
            edit_image(find_image(other, train["image_id"].iloc[0]))
        for verb in ("prepare", "run"):
            line = refused(verb, "--data", other, "--out", "run", *words)
            assert "run/fold0/" in line and "was trained on other" in line, what
        assert hash_files(run_copy, but=["manifest.json"]) == before, what
    assert "tune: up to date" in command("tune", "--out", "run").out
    for folder in run_copy.glob("fold*"):
        if folder.is_dir():
            shutil.rmtree(folder)
    assert command("prepare", "--data", other, "--out", "run", "--fold-table", "folds.csv").status == 0
    for verb in ("predict", "tune", "score", "submit"):
        assert "fold 0 is not trained" in refused(verb, "--out", "run")


def test_a_changed_test_image(solution, marked, command, check_stale, data):
    ids = read_table(marked / "sample_submission.csv").iloc[:, 0]
    edit_image(find_image(data, ids[0]))
    weights = write_times(marked, "fold*/*/*")
    assert command("prepare", "--data", data, "--out", "run").status == 0
    check_stale("predict")
    result = command("run", "--data", data, "--out", "run")
    assert result.status == 0 and "epoch" not in result.out and "predict: up to date" not in result.out
    assert write_times(marked, "fold*/*/*") == weights
    assert read_table(marked / "submission.csv").iloc[:, 0].tolist() == ids.tolist()


def test_other_test_images(solution, run_copy, command, refused, sample, tmp_path):
    wanted = (run_copy / "submission.csv").read_bytes()
    ids = read_table(run_copy / "sample_submission.csv").iloc[:, 0].tolist()
    (tmp_path / "mine").mkdir()
    for number, image_id in enumerate(ids[:2]):
        source = find_image(sample, image_id)
        shutil.copy(source, tmp_path / "mine" / f"mine-{1 - number}{source.suffix}")
    assert "prepared with another --test" in refused("predict", "--out", "run", "--test", "mine")
    assert command("run", "--data", sample, "--out", "run", "--test", "mine").status == 0
    assert read_table(run_copy / "submission.csv").iloc[:, 0].str.startswith("mine-").sum() == 2
    assert read_json(run_copy / "manifest.json")["steps"]["submit"]["hidden"] is None
    result = command("run", "--data", sample, "--out", "run")
    assert result.status == 0 and "epoch" not in result.out
    assert (run_copy / "submission.csv").read_bytes() == wanted
