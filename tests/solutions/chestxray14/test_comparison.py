"""`table` and `score_predictions` on runs whose figures are known and on other people's predictions."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks.tables import label_table, real_data
from common import cli, compare
from common.compare import comparison_tools
from common.config import from_dict, to_dict
from common.metrics.classification import mean_of_defined
from common.metrics.statistics import bootstrap_auroc, delong_intervals, delong_test, interval_with_p, resample_aurocs
from common.paths import read_json, strip_suffix, write_json
from solutions.chestxray14 import comparison, config
from solutions.chestxray14.comparison import COMPARISON
from solutions.chestxray14.config import LABELS, Config, NetworkConfig
from solutions.chestxray14.labels import names_digest

NAMES = list(LABELS)
N = 120


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("score_predictions …")` in a folder of its own: status, text, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "open_run", open_fake)
    monkeypatch.setattr(compare, "require", lambda job, step: None)
    tools = comparison_tools(SimpleNamespace(name="chestxray14", comparison=COMPARISON), Config)

    def run(line):
        status = cli.main("chestxray14", config, dict, line.split(), lambda tool: tools)
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, errors=said.err.strip())

    return run


@contextmanager
def open_fake(recipe, config_class, folder, device):
    """Yield a job with the images and predictions that `make_run` wrote; no networks, whose weights would be needed."""
    table = pd.read_parquet(folder / "images.parquet").assign(row=range(N))
    by_id = table.set_index("image_id", drop=False)["row"]
    images = SimpleNamespace(at=table.iloc.__getitem__, rows_of=lambda ids: by_id[ids].to_numpy())
    images.rows = lambda split: np.arange(N)
    about = {"prepare": {"about": {"said": "not the whole official lists"}, "synthetic": False}}
    run = SimpleNamespace(path=lambda name: folder / name, step=about.get)
    made = from_dict(Config, read_json(folder / "config.json"))
    yield SimpleNamespace(config=made, images=images, run=run, steps={"predict": None})


def world(seed=0):
    """Labels 0/1 of N images of 40 patients, a hernia being absent, and the images' table."""
    rng = np.random.default_rng(seed)
    y = (rng.random((N, 14)) < 0.3).astype(np.int8)
    y[:, -1] = 0
    patients = np.arange(N) // 3
    ids = [f"{patient + 1:08d}_{k % 3:03d}" for k, patient in enumerate(patients)]
    table = pd.DataFrame({"image_id": ids, "file_name": [f"{i}.png" for i in ids], "patient_id": patients.astype(str)})
    return y, pd.concat([table, pd.DataFrame(y, columns=NAMES)], axis=1)


def scores(y, seed, signal):
    rng = np.random.default_rng(seed)
    return np.clip(0.2 + signal * y + 0.2 * rng.random(y.shape), 0, 1)


def save(path, images, probs):
    patients = images["patient_id"].astype(int) if path.name.startswith("oof") else pd.Series(-1, images.index)
    table = pd.DataFrame({"image_id": images["image_id"], "fold": patients % 2 - 2 * (patients < 0)})
    pd.concat([table, pd.DataFrame(probs, columns=NAMES)], axis=1).to_parquet(path)


def make_run(folder, images, probs, views="whole", averaging=("last",)):
    folder.mkdir()
    network = NetworkConfig(averaging=averaging)
    write_json(folder / "config.json", to_dict(Config(views=views, combine="mean", whole=network, lungs=network)))
    images.to_parquet(folder / "images.parquet")
    for name, values in {"test": probs, "oof": probs[::-1]}.items():
        save(folder / f"{name}.parquet", images, values)


@pytest.fixture
def runs(tmp_path):
    """Two runs on the same images: `plain`, and `both` with two branches, of which the answer is the best."""
    y, images = world()
    made = {
        "plain": scores(y, 1, 0.1),
        "whole": scores(y, 2, 0.1),
        "lungs": scores(y, 3, 0.08),
        "both": scores(y, 4, 0.2),
    }
    make_run(tmp_path / "plain", images, made["plain"])
    branches = {f"{split}_{view}": made[view] for split in ("test", "oof") for view in ("whole", "lungs")}
    make_run(tmp_path / "both", images, made["both"], "both")
    order = np.random.default_rng(0).permutation(N)  # the order of a table's rows means nothing
    for name, values in (branches | {"test": made["both"], "oof": made["both"]}).items():
        save(tmp_path / "both" / f"{name}.parquet", images.iloc[order].reset_index(drop=True), values[order])
    return SimpleNamespace(y=y, images=images, folder=tmp_path, **made)


def test_table_has_a_row_a_run_and_two_more_for_its_views(command, runs):
    done = command("table plain both --out table.csv --resamples 50")
    assert done.status == 0 and not done.errors
    found = pd.read_csv(runs.folder / "table.csv").set_index(["run", "metric"])
    assert found.index.get_level_values("run").unique().tolist() == ["plain", "both: whole", "both: lungs", "both"]
    patients = runs.images["patient_id"]
    for name, score in {"plain": runs.plain, "both: lungs": runs.lungs, "both": runs.both}.items():
        mine = found.loc[name]
        expected = [roc_auc_score(runs.y[:, c], score[:, c]) for c in range(13)]
        np.testing.assert_allclose(mine["pooled"], [*expected, np.nan, np.mean(expected)], atol=1e-12)
        classes, mean = bootstrap_auroc(runs.y, score, patients, 50, skip_undefined=True)
        assert mine.loc["mean", "low"] == pytest.approx(mean.low)
        assert mine.loc["Mass", "high"] == pytest.approx(classes[4].high)
        intervals = delong_intervals(runs.y, score)[:, 1:]
        np.testing.assert_allclose(mine.loc[NAMES, ["delong_low", "delong_high"]], intervals)
    scores = [resample_aurocs(runs.y, each, patients, 50, 0, True) for each in (runs.both, runs.plain)]
    both = zip(scores[0][0] - scores[1][0], (scores[0][1] - scores[1][1]).T, strict=True)
    gains = [interval_with_p(*gain, 0.95) for gain in both]
    means = [(mean_of_defined(estimate), mean_of_defined(drawn)) for estimate, drawn in scores]
    difference, p_value = interval_with_p(means[0][0] - means[1][0], means[0][1] - means[1][1], 0.95)
    mean = found.loc[("both", "mean")]
    assert mean["difference"] == pytest.approx(difference.estimate) and mean["p"] == pytest.approx(p_value)
    assert mean["difference_low"] == pytest.approx(difference.low)
    areas = [found.loc[name].loc[NAMES[:13], "pooled"] for name in ("both", "plain")]
    assert mean["p_t_test"] == pytest.approx(stats.ttest_rel(*areas).pvalue)
    tested = found.loc["both"].loc[NAMES]
    np.testing.assert_allclose(tested["p_delong"], delong_test(runs.y, runs.both, runs.plain)[:, 3])
    np.testing.assert_allclose(tested["p"], [p for _, p in gains])
    assert found.loc["plain", "difference"].isna().all()
    assert "120 images of 40 patients" in done.out and "labels with images of one kind only" in done.out
    assert "both: whole against plain: mean AUROC" in done.out and "not the whole official lists" in done.out
    measured, published = done.out.split("published\n", 1)
    assert re.search(r"CXR-IRNet +0.8335 +Fang, table 2", published) and "0.8335" not in measured
    assert re.search(r"CheXNet \(DenseNet-121\) +0.8105 +Fang, table 2: their re-run", published)
    sure = tested[tested["p_delong"] < 0.05]["difference"]
    assert f"by DeLong's test with p < 0.05, higher in {(sure > 0).sum()}, lower in {(sure < 0).sum()}" in done.out


def test_table_of_one_run_compares_its_views_and_its_page_has_the_plots(command, runs):
    done = command("table both --out page.csv --resamples 20")
    assert "both against both: whole: mean AUROC +" in done.out and "both: lungs against both: whole" in done.out
    text = (runs.folder / "page.html").read_text()
    assert text.count("<svg ") == 2 and "Published" in text and "both: lungs" in text
    assert "published: CXR-IRNet" in text and ">0.8377<" in text and "their re-run" in text
    done = command("table both --against both --resamples 20")
    assert "both: whole against both: mean AUROC -" in done.out
    alone = command("table plain --resamples 20")
    assert alone.status == 0 and "against" not in alone.out


def test_table_out_of_fold_has_means_of_folds_and_says_where_epochs_were_chosen(command, runs):
    make_run(runs.folder / "chosen", runs.images, runs.both, averaging=("best",))
    folds, scaled = runs.images["patient_id"].astype(int).to_numpy() % 2, runs.both.copy()
    scaled[folds == 0] *= 0.1  # one network's scores lie far below the other's
    save(runs.folder / "chosen" / "oof.parquet", runs.images, scaled)
    done = command("table plain chosen --split oof --resamples 20 --out table.csv")
    assert done.status == 0, done.errors
    assert "oof: 120 images of 40 patients" in done.out
    assert "chosen: its epochs were chosen on these very images" in done.out
    assert "plain: its epochs" not in done.out
    found = pd.read_csv(runs.folder / "table.csv").set_index(["run", "metric"])
    for name, score in {"plain": runs.plain[::-1], "chosen": scaled}.items():
        both = [[roc_auc_score(runs.y[folds == k, c], score[folds == k, c]) for c in range(13)] for k in (0, 1)]
        each = found.loc[name]
        np.testing.assert_allclose(each.loc[NAMES[:13], "fold_mean"], np.mean(both, 0))
        assert each.loc["mean", "fold_mean"] == pytest.approx(np.mean(both)) and each.loc["mean", "folds"] == 2
        assert f"{np.mean(both):.4f} ± {np.std(np.mean(both, 1), ddof=1):.4f}" in done.out
    mean = found.loc[("chosen", "mean")]
    assert mean["pooled"] < mean["fold_mean"] - 0.05  # what pooling costs


def test_images_without_labels_are_left_out_and_said(command, runs):
    images = runs.images.copy()
    images.loc[:9, NAMES] = -1
    images.to_parquet(runs.folder / "plain" / "images.parquet")
    done = command("table plain --resamples 20")
    assert done.status == 0 and "10 predicted images have no labels and are left out" in done.out
    assert "110 images" in done.out
    images[NAMES] = -1
    images.to_parquet(runs.folder / "plain" / "images.parquet")
    assert command("table plain").errors == (
        "error: plain: its images have no labels (--split oof: the training images, out of fold)"
    )


def test_runs_with_other_labels_are_refused(command, runs):
    other = runs.images.copy()
    other.loc[5, "Mass"] = 1 - other.loc[5, "Mass"]
    make_run(runs.folder / "other", other, runs.plain)
    assert f"other: another truth of {other['image_id'][5]} than in plain" in command("table plain other").errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table", "name the folders of the runs"),
        ("table plain plain", "plain: named twice"),
        ("table plain --against nobody", "--against nobody: the rows are plain"),
        ("table plain --out table.html", "--out table.html: the figures are a .csv"),
        ("table plain --resamples 0", "--resamples 0"),
    ],
)
def test_bad_options_of_table(command, runs, line, message):
    done = command(line)
    assert done.status == 2 and done.errors.startswith("error: ") and message in done.errors and "\n" not in done.errors


# ---- score_predictions ---------------------------------------------------------------------------------------------


@pytest.fixture
def given(tmp_path):
    """A label table in NIH's form and a stranger's predictions of its images."""
    y, images = world(5)
    texts = ["|".join(np.array(NAMES)[row > 0]) or "No Finding" for row in y]
    labels = pd.DataFrame(
        {"Image Index": images["file_name"], "Finding Labels": texts, "Patient ID": images["patient_id"]}
    )
    labels.to_csv(tmp_path / "labels.csv", index=False)
    probs = pd.DataFrame(scores(y, 6, 0.1), columns=NAMES)
    probs.insert(0, "Image Index", images["file_name"])
    probs.to_csv(tmp_path / "probs.csv", index=False)
    return SimpleNamespace(y=y, images=images, labels=labels, probs=probs, folder=tmp_path)


def areas(given, kept=slice(None)):
    return [roc_auc_score(given.y[kept, c], given.probs.to_numpy()[kept, c + 1].astype(float)) for c in range(13)]


def test_score_prints_both_intervals_and_names_the_labels(command, given):
    done = command("score_predictions probs.csv --labels labels.csv --out out.csv --resamples 50")
    assert done.status == 0 and not done.errors
    found = pd.read_csv(given.folder / "out.csv").set_index("metric")
    np.testing.assert_allclose(found["estimate"], [*areas(given), np.nan, np.mean(areas(given))], atol=1e-12)
    probs = given.probs[NAMES].to_numpy()
    _, mean = bootstrap_auroc(given.y, probs, given.images["patient_id"], 50, skip_undefined=True)
    assert found.loc["mean", "high"] == pytest.approx(mean.high)
    assert found.loc["Mass", "delong_low"] == pytest.approx(delong_intervals(given.y, probs)[4, 1])
    assert found.loc["Mass", "positive"] == given.y[:, 4].sum()
    assert re.search(r"labels of labels\.csv, sha256 [0-9a-f]{16}; predictions of probs\.csv, sha256", done.out)
    assert re.search(rf"mean .*{np.mean(areas(given)):.4f} \[.*\n(.*\n)*.*120 images of 40 patients", done.out)
    assert "; not the official test list: 120 images, not comparable with published means" in done.out
    assert "labels.csv: 120 images, not NIH's whole table of 112,120: its release is unknown" in done.out


def test_any_spelling_of_the_header_and_order_of_the_rows_scores_the_same(command, given):
    expected = command("score_predictions probs.csv --labels labels.csv --resamples 20").out.split("\n\n", 1)[1]
    spelled = given.probs.rename(columns=lambda name: "prob_" + name.lower().replace("_", " "))
    spelled.columns = ["image_id", *spelled.columns[1:]]
    spelled["image_id"] = [f"images/{name.removesuffix('.png')}" for name in spelled["image_id"]]
    spelled["my_note"] = 0.5
    spelled[spelled.columns[::-1]][["image_id", *spelled.columns[:0:-1]]].iloc[::-1].to_csv("spelled.csv", index=False)
    done = command("score_predictions spelled.csv --labels labels.csv --resamples 20")
    assert done.out.split("\n\n", 1)[1].split("[")[0] == expected.split("[")[0]
    assert re.findall(r"0\.\d{4} \[", done.out) == re.findall(r"0\.\d{4} \[", expected)
    assert "ignored columns that are not classes: my_note" in done.out


def test_list_and_missing_classes_and_images(command, given):
    (given.folder / "list.txt").write_text("\n".join([*given.images["file_name"][:90], "00099999_000.png"]))
    stranger = pd.concat(
        [
            given.probs.drop(columns="Edema"),
            given.probs.drop(columns="Edema")[:2].assign(**{"Image Index": ["strange_1.png", "strange_2.png"]}),
        ]
    )
    stranger.to_csv("stranger.csv", index=False)
    done = command("score_predictions stranger.csv --labels labels.csv --list list.txt --resamples 20")
    assert done.status == 0 and "no column for Edema: left out of the mean" in done.out
    assert "90 of its 91 images are predicted" in done.out
    known = np.delete(areas(given, slice(90)), NAMES.index("Edema"))
    assert (
        f" {known.mean():.4f} [" in done.out and "90 images of 30 patients; 1 of the 91 listed images are" in done.out
    )
    assert "missing from the predictions; it is not the official test list" in done.out
    done = command("score_predictions stranger.csv --labels labels.csv --resamples 20")
    assert done.status == 4 and "left out: 2 predicted images without labels, such as strange_1" in done.out


def test_the_official_list_is_comparable_where_all_of_it_is_scored(command, given, monkeypatch):
    names = given.images["file_name"]
    monkeypatch.setitem(comparison.DIGESTS, "test", names_digest(names.map(strip_suffix)))
    (given.folder / "list.txt").write_text("\n".join(names))
    line = "score_predictions probs.csv --labels labels.csv --list list.txt --resamples 5"
    assert "; all 120 images of the official test list, verified by the hash of its names\n" in command(line).out
    given.labels[5:].to_csv("labels.csv", index=False)
    assert "; 0 of the 120 listed images are missing from the predictions, 5 from the labels: not" in (
        command(line).out
    )
    given.probs[2:].to_csv("probs.csv", index=False)
    assert "; 2 of the 120 listed images are missing from the predictions, 3 from the labels: not" in (
        command(line).out
    )


def test_labels_without_patients(command, given):
    given.labels.drop(columns="Patient ID").to_csv("labels.csv", index=False)
    done = command("score_predictions probs.csv --labels labels.csv --resamples 20")
    assert done.status == 0 and "labels.csv names no patients: images count as independent" in done.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p, t: (p.rename(columns={"Image Index": "name"}), t),
            "the first column must be Image Index or image_id",
        ),
        (lambda p, t: (p[["Image Index"]], t), "no column bears the name of one of the 14 classes"),
        (lambda p, t: (p.assign(prob_mass=1), t), "row 1: two columns are Mass"),
        (
            lambda p, t: (p.astype(object).replace({"Mass": {p["Mass"][3]: "x"}}), t),
            "probs.csv, row 5, Mass: 'x' is not",
        ),
        (lambda p, t: (pd.concat([p, p[:1]]), t), "probs.csv, row 122: 00000001_000 appears twice"),
        (lambda p, t: (p, t[120:]), "labels.csv: no rows under its header"),
        (lambda p, t: (p, pd.concat([t, t[:1]])), "labels.csv, row 122: 00000001_000 appears twice"),
        (lambda p, t: (p, t.assign(**{"Finding Labels": "Covid"})), "row 2 (00000001_000): 'Covid' is neither"),
        (lambda p, t: (p, t.assign(**{"Finding Labels": ["", *t["Finding Labels"][1:]]})), "_000): '' is neither"),
        (lambda p, t: (p, t.assign(**{"Patient ID": ["", *t["Patient ID"][1:]]})), "_000): no Patient ID"),
        (lambda p, t: (p, t.assign(**{"Finding Labels": "No Finding"})), "no score is defined on these 120 images"),
        (lambda p, t: (p, t.drop(columns="Finding Labels")), "no column Finding Labels"),
        (lambda p, t: (p, t.assign(**{"Image Index": "x" + t["Image Index"]})), "has no labels for any of its images"),
    ],
)
def test_unusable_tables_are_refused(command, given, change, message):
    for table, name in zip(change(given.probs, given.labels), ("probs.csv", "labels.csv"), strict=True):
        table.to_csv(name, index=False)
    done = command("score_predictions probs.csv --labels labels.csv --resamples 5")
    assert done.status == 2 and message in done.errors and "\n" not in done.errors


def test_unusable_lists_and_outputs_are_refused(command, given):
    (given.folder / "empty.txt").write_text("\n")
    (given.folder / "others.txt").write_text("00099999_000.png\n")
    line = "score_predictions probs.csv --labels labels.csv"
    assert "empty.txt: empty file" in command(f"{line} --list empty.txt").errors
    assert "none of the predicted images is in it" in command(f"{line} --list others.txt").errors
    assert "none.txt: no such file" in command(f"{line} --list none.txt").errors
    assert "--out probs.csv: is the table of predictions" in command(f"{line} --out probs.csv").errors
    assert "--out labels.csv: is --labels" in command(f"{line} --out labels.csv").errors


def test_public_densenet_scores_what_its_authors_say(command):
    folder, labels = real_data("chestxray14"), label_table("Data_Entry_2017_v2020.csv.gz")
    if folder is None or labels is None:
        pytest.skip("needs CXR_REAL_DATA with chestxray14, and the package torchxrayvision")
    done = command(
        f"score_predictions {folder / 'densenet121_test_predictions.csv'} --labels {labels} --resamples 100 --out o.csv"
    )
    found = pd.read_csv("o.csv").set_index("metric")
    assert done.status == 0 and found.loc["mean", "estimate"] == pytest.approx(0.8384, abs=0.002)
    assert found.loc["mean", "low"] < 0.8384 < found.loc["mean", "high"]
    assert "22,433 images of 6,187 patients" in done.out and "as NIH's release of 2020" in done.out
