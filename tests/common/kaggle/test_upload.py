"""`upload` and `log` with the real client against the local server."""

import json
import multiprocessing

import pandas as pd
import pytest

from common.config import file_hash
from common.errors import InputError
from common.kaggle import upload
from common.kaggle.log_page import PAGE, describe_agreement, plot_cv_against_lb
from common.kaggle.upload import LOG, append_row, read_log, set_scores
from common.paths import lock_folder
from solutions.siim_pneumothorax.config import SLUG

WORDS = ("siim_pneumothorax", "upload")
ROW = dict.fromkeys(upload.COLUMNS, "") | {
    "solution": "siim_pneumothorax",
    "sha256": "ab" * 32,
    "date": "2026-01-02 03:04",
}


@pytest.fixture
def run(server, home, tmp_path):
    """A run with a submission, its sample and its score; the server has its competition."""
    server.competitions[SLUG] = b""
    folder = tmp_path / "work/runs/siim-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"solution": "siim_pneumothorax", "preset": "demo"}')
    (folder / "sample_submission.csv").write_text("ImageId,EncodedPixels\na,-1\nb,-1\n")
    (folder / "submission.csv").write_text("ImageId,EncodedPixels\na,-1\nb,5 3\n")
    (folder / "score.json").write_text(json.dumps({"dice": {"estimate": 0.8412, "low": 0.829, "high": 0.853}}))
    return folder


@pytest.fixture
def words(run):
    return (*WORDS, run / "submission.csv", "-m", "fpn,  five folds")


def test_a_submission_is_sent_scored_and_logged(server, command, refused, run, words):
    status, said, _ = command(*words)
    assert status == 0 and "4 submissions remaining today" in said
    assert "public score 0.8421, private 0.8100, offline 0.8412" in said and "minutes for the score: pending" in said
    row = read_log().iloc[0].to_dict()
    sha256 = row.pop("sha256")
    assert row.pop("date") and row.pop("git") is not None and sha256 == file_hash(run / "submission.csv")
    about = {"solution": "siim_pneumothorax", "run": "siim-1", "rows": "2", "message": "fpn, five folds"}
    cv = {"cv": "0.841200", "cv_low": "0.829000", "cv_high": "0.853000"}
    assert row == about | cv | {"public": "0.8421", "private": "0.8100"}
    sent = server.submissions[0]
    assert sent["content"] == (run / "submission.csv").read_bytes()
    assert sent["description"] == f"fpn, five folds [{sha256[:12]}]"
    asked = len(server.requests)
    assert "was uploaded on" in (line := refused(*words)) and "--again" in line and len(server.requests) == asked


def test_a_message_is_no_formula_in_the_log(command, refused, run, words):
    assert command(*words[:-1], "=1+1", "--wait", "0")[0] == 0
    assert read_log()["message"].tolist() == ["'=1+1"]
    assert command(*words[:-1], "-1 more")[0] == 0 and read_log()["message"].tolist() == ["'=1+1"]  # the score alone
    assert read_log()["public"].tolist() == ["0.8421"]


def test_a_refit_has_no_offline_score(command, run, words):
    (run / "score.json").write_text("{}")
    status, said = command(*words, "--wait", "0")[:2]
    assert status == 0 and "no offline score to log" in said
    assert read_log()[["cv", "cv_low", "cv_high"]].iloc[0].tolist() == ["", "", ""]


FIGURES = ("5", '{"estimate": "x"}', '{"estimate": 1, "low": "x"}', '{"estimate": NaN}', '{"estimate": 1, "high": [1]}')


@pytest.mark.parametrize("score", ["[]", "5", *(f'{{"dice": {figure}}}' for figure in (*FIGURES, "1" * 400))])
def test_damaged_scores(refused, run, words, score):
    (run / "score.json").write_text(score)
    assert "score.json: no figure 'dice' with an estimate" in refused(*words)


def test_a_refused_transfer_is_no_upload(server, refused, words):
    server.refuse("PUT", 403)
    assert "error: not uploaded: " in (line := refused(*words)) and "refused the transfer of the file" in line
    assert not LOG.exists() and server.submissions == []


def test_a_lost_answer_is_found_in_the_list(server, command, words):
    server.lose("CreateSubmission")
    status, said, _ = command(*words, "--wait", "0")
    assert status == 0 and "Kaggle lists the submission" in said
    assert len(server.submissions) == 1 and read_log()["public"].tolist() == [""]


def test_the_score_is_fetched_later_and_again_sends_again(server, command, refused, words):
    server.polls = 4
    assert command(*words, "--wait", "0")[0] == 0 and read_log()["public"].tolist() == [""]
    status, said, _ = command(*words, "--wait", "0.0001")
    assert status == 0 and "no score after 0 minutes (pending); the same command asks again" in said
    assert "asking for its score" in said and "public score 0.8421" in command(*words)[1]
    assert len(server.submissions) == 1 and len(read_log()) == 1
    server.score = lambda content: "0.9000"  # of the second one alone
    assert command(*words, "--again")[0] == 0 and read_log()["public"].tolist() == ["0.8421", "0.9000"]
    assert "was uploaded on" in refused(*words)


def test_an_error_while_waiting_is_no_failure(server, command, words, monkeypatch):
    wait = upload._wait_for_score

    def refuse_first(*args):
        server.refuse("ListSubmissions", 429)
        wait(*args)

    monkeypatch.setattr(upload, "_wait_for_score", refuse_first)
    status, said, _ = command(*words)
    assert status == 0 and "too many requests (429)" in said and "public score 0.8421" in said


def test_a_file_that_only_kaggle_knows_is_logged(server, command, words):
    command(*words)
    LOG.unlink()
    status, said, _ = command(*words)
    assert status == 0 and "Kaggle has this file since" in said and len(server.submissions) == 1
    assert read_log()["public"].tolist() == ["0.8421"]


def test_no_submissions_left_and_one_that_cannot_be_scored(server, refused, words):
    server.left = 0
    line = refused(*words)
    assert "not uploaded" in line and "daily Submission allowance (5) today, please try again tomorrow" in line
    assert not LOG.exists()
    server.left, server.score = 1, lambda content: None
    line = refused(*words)
    assert f"could not score the submission (no such image); see https://www.kaggle.com/competitions/{SLUG}" in line
    assert read_log()["public"].tolist() == ["error"]


def test_two_uploads_at_once(refused, words):
    with lock_folder(LOG.parent, "uploading"):
        assert "another process is uploading" in refused(*words)


def test_invalid_submissions_are_refused_before_anything_is_sent(server, refused, run, tmp_path):
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
    (run / "score.json").write_text('{"auroc": {}}')
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
        append_row(ROW | {"sha256": f"{k:064d}", "message": f'a "quoted", line {k}'}, path)


def test_processes_at_once_lose_no_row(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_rows, args=(tmp_path / "log.csv", first)) for first in (0, 100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    table = read_log(tmp_path / "log.csv")
    assert sorted(map(int, table["sha256"])) == [*range(15), *range(100, 115), *range(200, 215)]
    assert 'a "quoted", line 7' in set(table["message"])


def test_a_score_goes_to_its_own_row(tmp_path):
    path = tmp_path / "log.csv"
    for date in ("2026-01-02 03:04", "2026-01-03 03:04"):
        append_row(ROW | {"date": date}, path)
    set_scores(ROW | {"date": "2026-01-03 03:04"}, "0.81", "", path)
    assert read_log(path)["public"].tolist() == ["", "0.81"]
    path.write_text("date,what\n1,2\n")
    with pytest.raises(InputError, match="row 1"):
        read_log(path)


def test_log_prints_and_draws(home, command, refused):
    assert "no submissions yet" in refused("log")
    for k, public in enumerate(("0.81", "0.84", "0.83", "")):
        cv = {"cv": f"{0.8 + 0.01 * k:.6f}", "cv_low": f"{0.79 + 0.01 * k:.6f}", "cv_high": f"{0.81 + 0.01 * k:.6f}"}
        append_row(ROW | cv | {"public": public, "message": "<b>bold</b>", "rows": "10"})
    status, said, _ = command("log")
    assert status == 0 and "0.8100 [0.8000, 0.8200]" in said and "1 without a score yet" in said
    page = PAGE.read_text()
    assert "<svg" in page and "&lt;b&gt;bold" in page and "<b>" not in page
    assert "In 2 of 3 pairs that differ in both scores, the higher cv" in page


def test_agreement_and_plot_without_enough(home):
    numbers = pd.DataFrame(dict.fromkeys(upload.NUMBERS, [float("nan")] * 2))
    assert describe_agreement(numbers).startswith("0 with both scores") and plot_cv_against_lb(numbers) is None
