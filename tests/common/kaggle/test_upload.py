"""`upload` and `log`: with the real client against the local server, and with its answers played."""

import json
import multiprocessing
from pathlib import Path

import pandas as pd
import pytest

from common.config import file_hash
from common.errors import InputError
from common.kaggle import client, log
from common.kaggle.log_page import agreement, cv_against_lb
from solutions.siim_pneumothorax.config import SLUG

WORDS = ("siim_pneumothorax", "upload")
ROW = dict.fromkeys(log.COLUMNS, "") | {
    "solution": "siim_pneumothorax",
    "sha256": "ab" * 32,
    "date": "2026-01-02 03:04",
}


@pytest.fixture
def run(home, tmp_path):
    """A run with a submission, its sample and its score."""
    folder = tmp_path / "work/runs/siim-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"solution": "siim_pneumothorax", "preset": "demo"}')
    (folder / "sample_submission.csv").write_text("ImageId,EncodedPixels\na,-1\nb,-1\n")
    (folder / "submission.csv").write_text("ImageId,EncodedPixels\na,-1\nb,5 3\n")
    (folder / "score.json").write_text(json.dumps({"dice": {"estimate": 0.8412, "low": 0.829, "high": 0.853}}))
    return folder


@pytest.fixture
def played(home, server, monkeypatch):
    """The client's words without its process: the server's functions are called, what it prints is put together."""
    server.competitions[SLUG] = b""

    def run(args, target, **options):
        if args[1] == "submissions":
            asked = server.ListSubmissions({"competitionName": SLUG})["submissions"]
            none = {"publicScore": None, "privateScore": None}
            return json.dumps([none | entry | {"status": "SubmissionStatus." + entry["status"]} for entry in asked])
        path, message = args[4], args[5].removeprefix("--message=")
        server.blobs["0"] = Path(path).read_bytes()
        asked = {"competitionName": SLUG, "blobFileTokens": "0", "submissionDescription": message}
        try:
            return server.CreateSubmission(asked)["message"]
        except Exception as error:
            raise InputError(client.explain(str(error), 1, target)) from None

    monkeypatch.setattr(client, "run", run)
    return server


def test_the_whole_trip_with_the_real_client(server, command, refused, run):
    server.competitions[SLUG] = b""
    status, said, _ = command(*WORDS, run / "submission.csv", "-m", "fpn,  five folds")
    assert status == 0 and "4 submissions remaining today" in said
    assert "public score 0.8421, private 0.8100, offline 0.8412" in said and "waiting for the score: pending" in said
    sha256 = file_hash(run / "submission.csv")
    row = log.read().iloc[0].to_dict()
    assert row | {"date": "", "git": ""} == {
        "date": "",
        "solution": "siim_pneumothorax",
        "run": "siim-1",
        "git": "",
        "sha256": sha256,
        "rows": "2",
        "cv": "0.841200",
        "cv_low": "0.829000",
        "cv_high": "0.853000",
        "public": "0.8421",
        "private": "0.8100",
        "message": "fpn, five folds",
    }
    sent = server.submissions[0]
    assert sent["content"] == (run / "submission.csv").read_bytes()
    assert sent["description"] == f"fpn, five folds [{sha256[:12]}]"
    asked = len(server.requests)
    line = refused(*WORDS, run / "submission.csv", "-m", "again")
    assert "was uploaded on" in line and "--again" in line and len(server.requests) == asked


def test_a_refused_transfer_ends_with_status_0_and_is_no_upload(server, refused, run):
    server.competitions[SLUG] = b""
    server.refuse("PUT", 403)
    line = refused(*WORDS, run / "submission.csv", "-m", "first")
    assert line.startswith("error: not uploaded: ") and "Could not submit to competition" in line
    assert not log.LOG.exists() and server.submissions == []


def test_a_lost_answer_is_found_in_the_list(server, command, run):
    server.competitions[SLUG] = b""
    server.lose("CreateSubmission")
    status, said, _ = command(*WORDS, run / "submission.csv", "-m", "first", "--wait", "0")
    assert status == 0 and "Kaggle lists the submission" in said
    assert len(server.submissions) == 1 and len(log.read()) == 1 and log.read()["public"].tolist() == [""]


def test_the_score_is_fetched_later_and_again_sends_again(played, command, refused, run):
    words = (*WORDS, run / "submission.csv", "-m", "first")
    played.polls = 4
    assert command(*words, "--wait", "0")[0] == 0 and log.read()["public"].tolist() == [""]
    status, said, _ = command(*words, "--wait", "0.0001")
    assert status == 0 and "no score after 0 minutes (pending); the same command asks again" in said
    assert "asking for its score" in said and "public score 0.8421" in command(*words)[1]
    assert len(played.submissions) == 1 and len(log.read()) == 1
    played.score = lambda content: "0.9000"  # of the second one alone
    assert command(*words, "--again")[0] == 0 and log.read()["public"].tolist() == ["0.8421", "0.9000"]
    assert "was uploaded on" in refused(*words)


def test_a_passing_fault_while_it_waits_is_no_failure(played, command, run, monkeypatch):
    real, calls = client.run, []

    def run_client(args, target, **options):
        calls.append(args[1])
        if calls == ["submissions", "submit", "submissions"]:
            raise InputError(client.explain("429 Client Error: Too Many Requests", 1, target))
        return real(args, target, **options)

    monkeypatch.setattr(client, "run", run_client)
    status, said, _ = command(*WORDS, run / "submission.csv", "-m", "first")
    assert status == 0 and "limit (429)" in said and "public score 0.8421" in said


def test_a_file_that_only_kaggle_knows_is_noted(played, command, run):
    words = (*WORDS, run / "submission.csv", "-m", "first")
    command(*words)
    log.LOG.unlink()
    status, said, _ = command(*words)
    assert status == 0 and "Kaggle has this file already" in said and len(played.submissions) == 1
    assert log.read()["public"].tolist() == ["0.8421"]


def test_no_submissions_left_and_one_that_cannot_be_scored(played, refused, run):
    words = (*WORDS, run / "submission.csv", "-m", "first")
    played.left = 0
    line = refused(*words)
    assert "not uploaded" in line and "daily Submission allowance (5) today, please try again tomorrow" in line
    assert not log.LOG.exists()
    played.left, played.score = 1, lambda content: None
    assert (
        f"could not score the submission; the reason stands at https://www.kaggle.com/competitions/{SLUG}"
        in refused(*words)
    )
    assert log.read()["public"].tolist() == ["error"]


def test_what_is_wrong_is_said_before_anything_is_sent(server, refused, run, tmp_path):
    file = tmp_path / "work/mine.csv"
    file.write_text("ImageId,EncodedPixels\na,-1\nc,-1\n")
    for words, line in (
        ((file, "-m", "x", "--run", run), "the sample submission has no such image"),
        ((file, "-m", "x", "--data", tmp_path), "no stage_2_sample_submission.csv"),
        ((file, "-m", " "), "say what is new"),
        ((file,), "message"),
        ((file, "-m", "x", "--wait", "-1"), "--wait must not be negative"),
        ((file, "-m", "x", "--run", tmp_path), "config.json: no such file"),
        ((tmp_path / "none.csv", "-m", "x"), "none.csv: no such file"),
        ((run / "score.json", "-m", "x"), "a submission is a .csv"),
        ((file, "-m", "x"), "name --run"),
    ):
        assert line in refused(*WORDS, *words), words
    (run / "score.json").write_text("{}")
    assert "no figure 'dice'" in refused(*WORDS, run / "submission.csv", "-m", "x")
    (run / "config.json").write_text('{"solution": "vinbigdata"}')
    assert "not a run of siim_pneumothorax" in refused(*WORDS, run / "submission.csv", "-m", "x")
    assert server.requests == []


def test_boxes_are_checked_as_boxes(refused, tmp_path):
    (tmp_path / "sample_submission.csv").write_text("image_id,PredictionString\na,14 1 0 0 1 1\n")
    (tmp_path / "mine.csv").write_text("image_id,PredictionString\na,3 0.5 10 10 5 20\n")
    line = refused("vinbigdata", "upload", tmp_path / "mine.csv", "-m", "x", "--data", tmp_path)
    assert "the box must have x_min < x_max" in line


# ---- the log -------------------------------------------------------------------------------------------------------


def add_rows(path, first):
    for k in range(first, first + 15):
        log.append(ROW | {"sha256": f"{k:064d}", "message": f'a "quoted", line {k}'}, path)


def test_processes_at_once_lose_no_row(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_rows, args=(tmp_path / "log.csv", first)) for first in (0, 100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    table = log.read(tmp_path / "log.csv")
    assert sorted(map(int, table["sha256"])) == [*range(15), *range(100, 115), *range(200, 215)]
    assert 'a "quoted", line 7' in set(table["message"])


def test_a_score_goes_to_its_own_row(tmp_path):
    path = tmp_path / "log.csv"
    for date in ("2026-01-02 03:04", "2026-01-03 03:04"):
        log.append(ROW | {"date": date}, path)
    log.set_scores("2026-01-03 03:04", ROW["sha256"], "0.81", "", path)
    assert log.read(path)["public"].tolist() == ["", "0.81"]
    assert len(log.rows_of(ROW["sha256"], "siim_pneumothorax", path)) == 2
    assert log.rows_of(ROW["sha256"], "vinbigdata", path).empty
    path.write_text("date,what\n1,2\n")
    with pytest.raises(InputError, match="row 1"):
        log.read(path)


def test_log_prints_and_draws(home, command, refused):
    assert "no submissions yet" in refused("log")
    for k, public in enumerate(("0.81", "0.84", "0.83", "")):
        cv = {"cv": f"{0.8 + 0.01 * k:.6f}", "cv_low": f"{0.79 + 0.01 * k:.6f}", "cv_high": f"{0.81 + 0.01 * k:.6f}"}
        log.append(ROW | cv | {"public": public, "message": "<b>bold</b>", "rows": "10"})
    status, said, _ = command("log")
    assert status == 0 and "0.8100 [0.8000, 0.8200]" in said and "1 without a score yet" in said
    page = log.PAGE.read_text()
    assert "<svg" in page and "&lt;b&gt;bold" in page and "<b>" not in page
    assert "Of 3 pairs of submissions that differ in both, 2 have the higher cv" in page


def test_agreement_and_plot_without_enough(home):
    numbers = pd.DataFrame(dict.fromkeys(log.NUMBERS, [float("nan")] * 2))
    assert agreement(numbers).startswith("0 with both scores") and cv_against_lb(numbers) is None
