"""`upload`: a submission checked, sent to its competition, waited for, and noted in submissions/log.csv."""

import fcntl
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from common.config import file_hash
from common.errors import InputError
from common.kaggle import client
from common.kaggle import log as submissions
from common.paths import competition_folder, read_json
from common.runs import git_revision
from common.submit.table import read_table

log = logging.getLogger(__name__)
POLL = 5.0  # seconds to the second question for a score; later ones come more slowly, up to
SLOWEST = 60.0
ARRIVAL = 20.0  # seconds within which Kaggle lists a submission that it took


def upload_tool(solution, source):
    """The tool `upload` of one solution."""

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
        """Check a submission, send it to its competition, wait for the score and note both in submissions/log.csv.

        Sent once, a file is not sent again: the same command then fetches its score.

        Args:
            submission: The CSV file.
            message: What is new in it, for Kaggle's list and the log.
            run: Folder of the run it comes from, for its offline score and the images it must have; by default the
                folder that the file is in, where that is a run.
            data: The competition's folder, whose sample submission names the images.
            wait: Minutes to wait for the score; 0: not at all.
            again: Send it though it was sent before.
        """
        message = " ".join(message.split())
        if not message:
            raise InputError("-m: say what is new in this submission")
        if not wait >= 0:
            raise InputError(f"--wait must not be negative: {wait:g}")
        if source.code_competition:
            raise InputError(f"{source.slugs[0]} takes notebooks only, no files: use the verb `notebook` with --push")
        run = run if run is not None or not (submission.parent / "config.json").is_file() else submission.parent
        row = describe(solution, source, submission, message, run, data)
        send(source.slugs[0], submission, row, wait, again)
        return 0

    return upload


def describe(solution, source, submission, message, run, data):
    """Check the submission and return its row of the log, as a dict; InputError where it cannot be one."""
    if not submission.is_file():
        raise InputError(f"{submission}: no such file")
    if submission.suffix != ".csv":
        raise InputError(f"{submission}: a submission is a .csv")
    if run is not None:
        about = read_json(run / "config.json")
        if not isinstance(about, dict) or about.get("solution") != solution:
            raise InputError(f"--run {run}: not a run of {solution}")
    log.info(f"valid submission: {source.check(submission, _sample(source, run, data))}")
    sha256, cv = file_hash(submission), _offline(source, run)
    if run is not None and (run / "submission.csv").is_file() and file_hash(run / "submission.csv") != sha256:
        log.info(f"{submission} is not what `submit` last wrote in {run}; the offline score may be another file's")
    rows = len(read_table(submission))
    name = "" if run is None else run.resolve().name
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    values = (date, solution, name, git_revision(), sha256, rows, *cv, "", "", message)
    return dict(zip(submissions.COLUMNS, values, strict=True))


def _sample(source, run, data):
    if data is None and run is not None:
        return run / "sample_submission.csv"
    problem = None
    for name in source.samples:
        try:
            return competition_folder(data, source.slugs[0], name) / name
        except InputError as error:
            problem = problem or error
    if data is None:
        raise InputError("name --run (the run's folder) or --data (the competition's): the images must be known")
    raise problem


def _offline(source, run):
    """Estimate, low and high of the run's offline score as text, blanks where there is none."""
    path = None if run is None else run / "score.json"
    if path is None or not path.is_file():
        log.info("no offline score beside it" + ("" if run is None else f": {run} has no score.json, run `score`"))
        return ("", "", "")
    found = read_json(path)
    figure = found.get(source.score) if isinstance(found, dict) else None
    if not isinstance(figure, dict) or not isinstance(figure.get("estimate"), int | float):
        raise InputError(f"{path}: no figure {source.score!r} with an estimate; run `score` again")
    return tuple("" if figure.get(k) is None else f"{figure[k]:.6f}" for k in ("estimate", "low", "high"))


def send(slug, submission, row, wait, again=False):
    """Send a file unless it was sent before, note it, and wait `wait` minutes for its score."""
    mark = f"[{row['sha256'][:12]}]"  # by which Kaggle's list shows what became of it
    with _one_at_a_time():
        before = submissions.rows_of(row["sha256"], row["solution"])
        if len(before) and not again:
            last = before.iloc[-1].to_dict()
            if last["public"]:
                scores = f"public {last['public']}, private {last['private'] or '–'}"
                raise InputError(
                    f"{submission}: was uploaded on {last['date']} ({last['message']}; {scores}); "
                    "--again uploads it once more"
                )
            log.info(f"{submission}: was uploaded on {last['date']}; asking for its score")
            row, older = last, set()
        else:
            older = _submit(slug, submission, f"{row['message']} {mark}", mark, again)
            submissions.append(row)
            log.info(f"noted in {submissions.LOG}: {submission} ({row['rows']:,} rows), {slug}")
    if wait > 0:
        _wait(slug, row, mark, older, wait)


def _one_at_a_time():
    """Two processes must not both find that a file is new."""
    path = submissions.LOG.with_name(".upload.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open(path, "w")  # noqa: SIM115 - the lock lasts as long as the file is open
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("another upload is under way; waiting for it")
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _submit(slug, submission, description, mark, again):
    """Send the file, where Kaggle does not have it; returns the numbers of what Kaggle lists of it from before."""
    known = _listed(slug, mark)
    if known and not again:  # sent from another folder, or by a process that died before it could note it
        log.info(f"Kaggle has this file already, since {known[0]['date'][:16]}: it is not sent again (--again does)")
        return set()
    refs, problem = {entry["ref"] for entry in known}, None
    command = ["competitions", "submit", slug, "-f", str(submission), f"--message={description}"]
    try:
        said = client.run(command, f"competition {slug}")
    except InputError as error:
        said, problem = "", error
    if "Successfully submitted" in said:
        remaining = re.search(r"(\d+) submissions remaining today", said)
        if remaining:
            log.info(remaining[0])
        return refs
    unsure = problem is not None and client.AGAIN in str(problem)
    ends = time.monotonic() + (ARRIVAL if unsure else 0)
    while True:  # the answer may be lost though the file arrived
        if any(entry["ref"] not in refs for entry in _listed(slug, mark)):
            log.info("the client ended in an error, but Kaggle lists the submission")
            return refs
        if time.monotonic() >= ends:
            break
        time.sleep(min(POLL, ARRIVAL))
    said = str(problem) if problem is not None else client.explain(said, 0, f"competition {slug}")
    raise InputError(f"not uploaded: {said.replace(client.AGAIN, 'the same command tries again')}")


def _listed(slug, mark):
    """The newest submissions whose description bears the mark, newest first."""
    said = client.run(
        ["competitions", "submissions", slug, "--format", "json", "--page-size", "100"], f"competition {slug}"
    )
    start = re.search(r"(?m)^\[", said)
    if start is None:
        return []
    try:
        entries, _ = json.JSONDecoder().raw_decode(said[start.start() :])
        return [entry for entry in entries if mark in (entry["description"] or "")]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"competition {slug}: the list of submissions cannot be read; {client.INSTALL}") from None


def _wait(slug, row, mark, older, minutes):
    """Ask for the score until it is there or the time is over; puts it into the log."""
    start, pause = time.monotonic(), POLL
    while True:
        try:
            found = [entry for entry in _listed(slug, mark) if entry["ref"] not in older]
        except InputError as error:  # it is sent and noted: a passing fault must not look like a failure
            if client.AGAIN not in str(error):
                raise
            log.info(str(error))
            found = []
        status = found[0]["status"].rsplit(".", 1)[-1] if found else "not listed yet"
        seconds = time.monotonic() - start
        _tell("")
        if status == "COMPLETE":
            public, private = (found[0][name] or "" for name in ("publicScore", "privateScore"))
            submissions.set_scores(row["date"], row["sha256"], public or "–", private)
            cv = f", offline {float(row['cv']):.4f}" if row["cv"] else ""
            log.info(f"public score {public or '–'}, private {private or '–'}{cv}")
            return
        if status == "ERROR":
            submissions.set_scores(row["date"], row["sha256"], submissions.FAILED, "")
            raise InputError(
                f"competition {slug}: Kaggle could not score the submission; the reason stands at "
                f"https://www.kaggle.com/competitions/{slug}/submissions"
            )
        if seconds + pause > 60 * minutes:
            log.info(f"no score after {seconds / 60:.0f} minutes ({status.lower()}); the same command asks again")
            return
        _tell(f"waiting for the score: {status.lower()}, {seconds / 60:.1f} of {minutes:g} minutes")
        time.sleep(pause)
        pause = min(1.5 * pause, SLOWEST)


def _tell(line):
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        log.info(line)
