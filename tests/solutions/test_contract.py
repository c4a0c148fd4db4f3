"""Every solution: verbs can be repeated, resumed to the same bytes and exported; wrong input is refused in one line."""

import errno
import os
from itertools import count

import numpy as np
import pandas as pd
import pytest

from common.cli import VERBS
from common.export import ABOUT
from common.nn import onnx
from common.paths import read_array, read_json, read_parquet, write_json
from common.submit.table import read_table
from tests.running import VARYING, hash_files, write_times
from tests.solutions.contract import MOSTLY_LONG, SOLUTIONS, find_image

DAMAGES = ("half", "nothing", "other")
every_solution = pytest.mark.parametrize("solution", SOLUTIONS, indirect=True)
mostly_long = pytest.mark.parametrize("solution", MOSTLY_LONG, indirect=True)


@every_solution
def test_a_run_ends_with_a_valid_submission_a_score_and_a_report(solution, finished, sample):
    run = finished / "run"
    score = next(value for value in read_json(run / "score.json").values() if isinstance(value, dict))
    assert score["low"] <= score["estimate"] <= score["high"]
    log = (run / "log.txt").read_text()
    assert "valid submission" in log and "<html" in (run / "report.html").read_text()[:300]
    copies = list((finished / "submissions").glob(f"{solution.name}-run-*.csv"))
    assert [path.read_bytes() for path in copies] == [(run / "submission.csv").read_bytes()]
    assert not list(run.rglob("last.ckpt")) and not list(finished.rglob(".*tmp*"))
    steps = read_json(run / "manifest.json")["steps"]
    assert [step for step in steps if " " not in step][:4] == ["prepare", "predict", "tune", "submit"]
    assert set(steps["submit"]["hidden"]) == {"metric", "value", "nothing"}
    assert read_json(run / "config.json")["solution"] == solution.name


@every_solution
def test_every_verb_twice(solution, run_copy, command, sample):
    prepared = {"manifest.json", "config.json", "images.parquet", "folds.csv", "sample_submission.csv"}
    again = {*prepared, *read_json(run_copy / "manifest.json")["steps"]["prepare"]["tables"]}  # with the same bytes
    before, written = hash_files(run_copy, but=["manifest.json"]), write_times(run_copy, "[!.]*.*", "fold*/**/*")
    written = {path: time for path, time in written.items() if path.name not in {*again, "log.txt", "report.html"}}
    for verb in [*VERBS][:-1]:
        result = command(verb, "--out", "run", *(["--data", sample] if verb == "prepare" else []))
        assert (result.status, result.errors) == (0, [])
        assert "epoch" not in result.out and (verb not in ("predict", "tune", "submit") or "up to date" in result.out)
    result = command("run", *solution.words, "--data", sample, "--out", "run")
    assert result.status == 0 and result.out.count("up to date") >= 3 and "epoch" not in result.out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert hash_files(run_copy, but=["manifest.json"]) == before


def stopping(limit, error):
    """Return an os.replace that raises `error` after `limit` calls."""
    replace, calls = os.replace, count()

    def stop(source, target):
        if next(calls) >= limit:
            raise error
        replace(source, target)

    return stop


@mostly_long
def test_an_interrupted_run_continues_to_the_same_bytes(solution, finished, command, sample, tmp_path, monkeypatch):
    """Each verb is interrupted before its second file, its fourth, its eighth …, by Ctrl-C and a full disk in turn."""
    words, stops = [*solution.words, "--data", sample, "--out", "run"], 0
    for verb in [*VERBS][:-1]:
        limit = 1
        while True:
            error = OSError(errno.ENOSPC, "No space left on device") if stops % 2 else KeyboardInterrupt()
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", stopping(limit, error))
                result = command(verb, *words)
            assert not list((tmp_path / "run").rglob(".*tmp*"))
            if result.status == 0:
                break
            assert result.status == (2 if stops % 2 else 3) and len(result.errors) == 1, result
            assert ("No space left on device" if stops % 2 else "the same command continues") in result.errors[0]
            stops, limit = stops + 1, limit * 2
        if verb == "prepare":
            result = command("run", *words, "--hours", "0.0001")
            assert result.status == 3 and "the same command continues" in result.out
            assert not (tmp_path / "run" / "submission.csv").exists()
            assert command("prepare", *words).status == 0  # in case the time ran out while its files were written
    assert stops >= 8
    assert hash_files(tmp_path / "run", but=VARYING) == hash_files(finished / "run", but=VARYING)


@every_solution
def test_verbs_before_prepare(solution, refused, tmp_path):
    for verb in solution.verbs:
        if verb not in ("prepare", "plan"):
            assert "not prepared; run the verb `prepare` first" in refused(verb, *solution.words, "--out", "run"), verb
    assert not (tmp_path / "run").exists()


@every_solution
def test_verbs_out_of_order(solution, run_copy, refused, tmp_path):
    manifest = read_json(run_copy / "manifest.json")

    def keep(*names):
        steps = {name: manifest["steps"][name] for name in names}
        write_json(run_copy / "manifest.json", {**manifest, "steps": steps})

    keep("prepare", "predict")
    for verb in ("score", "submit"):
        assert "`tune` has no result yet; run the verb `tune`" in refused(verb, "--out", "run")
    keep("prepare")
    for verb in ("tune", "score", "submit"):
        assert "`predict` has no result yet; run the verb `predict`" in refused(verb, "--out", "run")
    (last,) = [path for path in run_copy.glob("fold1/*/final.safetensors")][-1:]
    last.unlink()
    for verb in ("predict", "tune", "score", "submit"):
        assert "fold 1 is not trained; run `train`" in refused(verb, "--out", "run")
    assert "fold 1 is not trained" in refused("export", "run", "--out", "trained")
    assert not (tmp_path / "trained").exists()


@every_solution
def test_an_export_gives_the_submission_of_the_run(solution, run_copy, command, sample, tmp_path):
    assert command("export", "run", "--out", "trained").status == 0
    assert all(path.is_file() for path in (tmp_path / "trained").iterdir())  # Kaggle's datasets are flat
    assert read_json(tmp_path / "trained" / ABOUT)["files"]
    run_copy.rename(tmp_path / "gone")  # nothing of it is read
    words = ["infer", "trained", "--data", sample, "--out", "out/answer.csv", "--work", "work", "--workers", "0"]
    result = command(*words)
    assert (result.status, result.errors) == (0, []) and "valid submission: out/answer.csv" in result.out
    assert (tmp_path / "out" / "answer.csv").read_bytes() == (tmp_path / "gone" / "submission.csv").read_bytes()
    predicted = sorted((tmp_path / "work").glob("test*"))
    assert predicted
    for path in predicted:  # a row is one of the run's store
        one, other = (read(folder / path.name) for folder in (tmp_path / "work", tmp_path / "gone"))
        assert one.equals(other), path.name
    # again in the same folder: nothing is predicted twice
    (tmp_path / "out" / "answer.csv").unlink()
    result = command(*words)
    assert result.status == 0 and "test: up to date" in result.out and (tmp_path / "out" / "answer.csv").exists()


@every_solution
@pytest.mark.long
def test_onnx_files_predict_as_torch_does(solution, run_copy, command, sample, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="pip install -e '.[onnx]'")
    monkeypatch.setattr(onnx.Fastest, "_measure", lambda self, images: self._sessions[0])  # even if torch is faster
    exported = command("export", "run", "--out", "trained", "--onnx")
    assert exported.status == 0, exported.errors
    files = list((tmp_path / "trained").glob("fold*.safetensors"))
    left_out = exported.out.count(".onnx: not written, since an ONNX file")  # detectors
    assert (
        len(list((tmp_path / "trained").glob("*.onnx")))
        == exported.out.count("equal to torch")
        == len(files) - left_out
    )
    words = ["--data", sample, "--out", "answer.csv", "--work", "work", "--workers", "0", "--device", "cpu"]
    assert command("infer", "trained", *words).status == 0
    for path in sorted((tmp_path / "work").glob("test*")):
        one, other = (read(folder / path.name).select_dtypes("number") for folder in (tmp_path / "work", run_copy))
        levels = 1 if path.suffix == ".b2nd" else 1e-3  # of 255, where rounding may differ
        np.testing.assert_allclose(one.to_numpy(float), other.to_numpy(float), atol=levels)


def read(path):
    """Predictions as a table without the store's rows."""
    if path.suffix == ".b2nd":
        maps = read_array(path)
        return pd.DataFrame(maps[:].reshape(len(maps), -1))
    return read_parquet(path).drop(columns="row", errors="ignore")


@mostly_long
def test_a_test_image_that_cannot_be_read(solution, run_copy, command, refused, data, finished, tmp_path):
    sample = read_table(run_copy / "sample_submission.csv")
    ids, path = sample.iloc[:, 0], find_image(data, sample.iloc[1, 0])
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    words = ["--data", data, "--out", "run"]
    result = command("run", *words)
    assert result.status in (2, 4) and path.name in "".join([result.out, *result.errors])
    result = command("run", *words, "--on-bad-image", "placeholder")
    assert result.status in (0, 4) and "epoch" not in result.out
    answered = read_table(run_copy / "submission.csv")
    assert answered.iloc[:, 0].tolist() == ids.tolist()
    assert command("export", "run", "--out", "trained").status == 0
    words = ["infer", "trained", "--data", data, "--workers", "0"]
    assert path.name in refused(*words) and not (tmp_path / "submission.csv").exists()
    result = command(*words, "--on-bad-image", "placeholder")
    assert result.status == 4 and "1 of the inputs" in result.errors[-1]
    assert (tmp_path / "submission.csv").read_bytes() == (run_copy / "submission.csv").read_bytes()


def spoil(path, damage):
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "nothing": b"", "other": b"[]"}[damage])


@every_solution
@pytest.mark.parametrize("damages", [DAMAGES, *(pytest.param([one], marks=pytest.mark.long) for one in DAMAGES)])
def test_damaged_results_are_made_again(damages, solution, run_copy, command, sample):
    whole = hash_files(run_copy, but=VARYING)
    names = sorted(name for name in whole if "/" not in name and name != "config.json")
    for number, name in enumerate(names, len(solution.name)):
        spoil(run_copy / name, damages[number % len(damages)])
    for verb in ("predict", "tune", "score", "submit"):
        result = command(verb, "--out", "run")
        assert result.status in (0, 2) and len(result.errors) == result.status // 2, result
    assert command("run", "--out", "run", "--data", sample).status == 0
    assert hash_files(run_copy, but=VARYING) == whole


@every_solution
def test_other_damaged_files_are_named(solution, run_copy, refused):
    names = ("final.safetensors", "variants.json")
    trained = [path for name in names for path in sorted(run_copy.glob(f"fold0/*/{name}"))]
    for number, path in enumerate([run_copy / "manifest.json", run_copy / "config.json", *trained]):
        before, verb = path.read_bytes(), "train" if path in trained else "tune"
        spoil(path, DAMAGES[(number + len(solution.name)) % 3])
        assert path.name in refused(verb, "--out", "run"), path
        path.write_bytes(before)


@every_solution
def test_commands_that_are_refused(solution, refused, tmp_path):
    (tmp_path / "file.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    for words, said in (
        ("walk demo", f"'walk' is not a verb of {solution.name}"),
        ("run fast", f"'fast' is not a preset of {solution.name}"),
        ("run demo --out run --sow 3", "Unrecognized options: --sow"),
        ("run --out run", "name a preset"),
        ("run demo --out run --data", "Missing value for argument '--data'"),
        ("run demo --out run --data nowhere", "nowhere: no such folder"),
        ("run demo --out run --data empty", "empty: no "),
        ("run demo --out file.csv --data empty", "file.csv: not a folder (--out)"),
        ("export nowhere --out trained", "nowhere: not the folder of a finished run"),
        ("infer empty", "empty: not an exported folder"),
    ):
        assert said in refused(*words.split()), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.csv"]
