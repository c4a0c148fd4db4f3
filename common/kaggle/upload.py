"""`upload`: check a submission, send it to its competition, log it in submissions/log.csv and wait for its score."""

import contextlib
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from common.config import file_hash
from common.errors import InputError, check, log
from common.kaggle.client import AGAIN, TransientError, connect
from common.paths import lock, lock_folder, read_json, write_csv
from common.runs import git_revision
from common.submit.table import read_table

POLL = 5.0  # seconds between the first two requests for a score; the interval then grows to
SLOWEST = 60.0
ARRIVAL = 20.0  # seconds within which Kaggle lists an accepted submission
LOG = Path("submissions/log.csv")
NUMBERS = ("rows", "cv", "cv_low", "cv_high", "public", "private")
COLUMNS = ("date", "solution", "run", "git", "sha256", *NUMBERS, "message")
FAILED = "error"  # replaces the public score if Kaggle could not compute it


def read_log(path=LOG):
    """Return the log as a table of strings, empty if there is none; raise InputError for any other file."""
    return read_table(path, COLUMNS) if Path(path).is_file() else pd.DataFrame(columns=COLUMNS, dtype=str)


@contextlib.contextmanager
def _open_log(path=LOG):
    """Yield the log's table and write it back afterwards, locked against other processes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as handle:  # not the log itself, which every write replaces
        lock(handle, path, "writing", wait=True)
        table = read_log(path)
        yield table
        write_csv(path, table)


def append_row(row, path=LOG):
    """Append a row (a dict by COLUMNS) to the log, safely beside other processes."""
    with _open_log(path) as table:
        table.loc[len(table)] = [str(row[name]) for name in COLUMNS]


def set_scores(row, public, private, path=LOG):
    """Write the scores of the last row with this row's date and hash."""
    with _open_log(path) as table:
        matches = table.index[(table["date"] == row["date"]) & (table["sha256"] == row["sha256"])]
        table.loc[matches[-1:], ["public", "private"]] = [str(public), str(private)]


def upload_tool(solution, source):
    """Return the tool `upload` of one solution."""

    def upload(
        submission: Path,
        /,
        *,
        message: Annotated[str, tyro.conf.arg(aliases=["-m"])],
        run: Path | None = None,
        data: Path | None = None,
        wait: float = 15.0,
        again: bool = False,
    ):
        """Check a submission, send it to its competition, wait for the score and log both in submissions/log.csv.

        A file is sent only once: the same command then fetches its score.

        Args:
            submission: The CSV file.
            message: What is new in it, for Kaggle's list and the log.
            run: Folder of its run, for the offline score and the ids it must have (default: the folder that the file
                is in, where that is a run).
            data: The competition's folder, whose sample submission names the images.
            wait: Minutes to wait for the score; 0: do not wait.
            again: Send it even if it was sent before.
        """
        message = " ".join(message.split())
        check(message, "-m: say what is new in this submission")
        check(wait >= 0, f"--wait must not be negative: {wait:g}")
        if source.code_competition:
            raise InputError(f"{source.slugs[0]} takes notebooks only, no files: use the verb `notebook` with --push")
        run = run if run is not None or not (submission.parent / "config.json").is_file() else submission.parent
        row = check_submission(solution, source, submission, message, run, data)
        send(source.slugs[0], submission, row, wait, again)
        return 0

    return upload


def check_submission(solution, source, submission, message, run, data):
    """Check the submission and return its row of the log, as a dict; raise InputError if it is invalid."""
    check(submission.is_file(), f"{submission}: no such file")
    check(submission.suffix == ".csv", f"{submission}: a submission is a .csv")
    if run is not None:
        about = read_json(run / "config.json")
        check(isinstance(about, dict) and about.get("solution") == solution, f"--run {run}: not a run of {solution}")
    check((run, data) != (None, None), "name --run (the run's folder) or --data (the competition's) for the ids")
    sample = source.find_file(data) if data is not None else run / "sample_submission.csv"
    log.info(f"valid submission: {source.check(submission, sample)}")
    sha256, cv = file_hash(submission), _read_offline_score(source, run)
    if run is not None and (run / "submission.csv").is_file() and file_hash(run / "submission.csv") != sha256:
        log.info(f"{submission} is not what `submit` last wrote in {run}; the offline score may be another file's")
    name, rows = "" if run is None else run.resolve().name, len(read_table(submission))
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    values = (date, solution, name, git_revision(), sha256, rows, *cv, "", "", message)
    return dict(zip(COLUMNS, values, strict=True))


def _read_offline_score(source, run):
    """Return estimate, low and high of the run's offline score as text, blank if there is none."""
    path = None if run is None else run / "score.json"
    if path is None or not path.is_file():
        log.info("no offline score to log" + ("" if run is None else f": {run} has no score.json, run `score`"))
        return ("", "", "")
    score = read_json(path)
    if score == {}:
        log.info(f"no offline score to log: {run} was trained on all images")
        return ("", "", "")
    figure = score.get(source.score) if isinstance(score, dict) else None
    values = [figure.get(name) for name in ("estimate", "low", "high")] if isinstance(figure, dict) else [None]
    if values[0] is None or not all(v is None or (type(v) in (int, float) and abs(v) < 1e9) for v in values):
        raise InputError(f"{path}: no figure {source.score!r} with an estimate; run `score` again")
    return tuple("" if value is None else f"{value:.6f}" for value in values)


def send(slug, submission, row, wait, again=False):
    """Send a file unless it was sent before, log it, and wait up to `wait` minutes for its score."""
    mark = f"[{row['sha256'][:12]}]"  # identifies the file in Kaggle's list
    with lock_folder(LOG.parent, "uploading"):  # otherwise two processes could send the same file
        table, older = read_log(), set()
        before = table[(table["sha256"] == row["sha256"]) & (table["solution"] == row["solution"])]
        if len(before) and not again:
            row = before.iloc[-1].to_dict()
            if row["public"]:
                scores = f"{row['message']}; public {row['public']}, private {row['private'] or '–'}"
                sent = f"{submission}: was uploaded on {row['date']} ({scores})"
                raise InputError(f"{sent}; --again uploads it once more")
            log.info(f"{submission}: was uploaded on {row['date']}; asking for its score")
        else:
            older = _submit(slug, submission, f"{row['message']} {mark}", mark, again)
            append_row(row)
            log.info(f"added to {LOG}: {submission} ({row['rows']:,} rows), {slug}")
    if wait > 0:
        _wait_for_score(slug, row, mark, older, wait)


def _submit(slug, submission, description, mark, again):
    """Send the file unless Kaggle already has it; return the refs of its earlier submissions, to be ignored."""
    known = _list_submissions(slug, mark)
    if known and not again:  # sent from another folder, or by a process that died before logging
        log.info(f"Kaggle has this file since {known[0].date:%Y-%m-%d %H:%M}; it is not sent again (--again does)")
        return set()
    older = {entry.ref for entry in known}
    try:
        with connect(f"competition {slug}") as api:
            answer = api.competition_submit(str(submission), description, slug)
            if answer.message == api.COMPETITION_SUBMIT_UPLOAD_FAILED_MESSAGE:  # this failure is returned, not raised
                raise InputError(f"competition {slug}: Kaggle refused the transfer of the file")
    except InputError as error:
        problem = error
    else:
        with contextlib.suppress(InputError), connect(f"competition {slug}") as api:  # for information only
            log.info(f"{api.competition_get_submission_limits(slug).num_allowed_now} submissions remaining today")
        return older
    ends = time.monotonic() + (ARRIVAL if isinstance(problem, TransientError) else 0)
    while True:  # the file may have arrived even if the response was lost
        if any(entry.ref not in older for entry in _list_submissions(slug, mark)):
            log.info("the client ended in an error, but Kaggle lists the submission")
            return older
        if time.monotonic() >= ends:
            raise InputError(f"not uploaded: {str(problem).replace(AGAIN, 'run the same command to try again')}")
        time.sleep(min(POLL, ARRIVAL))


def _list_submissions(slug, mark):
    """Return the latest submissions whose description has the mark, newest first."""
    with connect(f"competition {slug}") as api:
        found = api.competition_submissions(slug, page_size=100) or []
    return [entry for entry in found if mark in (entry.description or "")]


def _wait_for_score(slug, row, mark, older, minutes):
    """Poll for the score and log it; give up when the time is over."""
    start, pause, last = time.monotonic(), POLL, None
    while True:
        try:
            found = [entry for entry in _list_submissions(slug, mark) if entry.ref not in older]
        except TransientError as error:  # no failure, since the file is sent and logged
            log.info(str(error))
            found = []
        status = found[0].status.name if found else "not listed yet"
        if status == "COMPLETE":
            public, private = found[0].public_score or "–", found[0].private_score or ""
            set_scores(row, public, private)
            cv = f", offline {row['cv']}" if row["cv"] else ""
            log.info(f"public score {public}, private {private or '–'}{cv}")
            return
        if status == "ERROR":
            set_scores(row, FAILED, "")
            reason = found[0].error_description or "no reason given"
            address = f"https://www.kaggle.com/competitions/{slug}/submissions"
            raise InputError(f"competition {slug}: Kaggle could not score the submission ({reason}); see {address}")
        seconds = time.monotonic() - start
        if seconds + pause > 60 * minutes:
            log.info(f"no score after {seconds / 60:.0f} minutes ({status.lower()}); the same command asks again")
            return
        if status != last:
            log.info(f"waiting up to {minutes:g} minutes for the score: {status.lower()}")
        time.sleep(pause)
        pause, last = min(1.5 * pause, SLOWEST), status
