"""The `kaggle` client, run as a program: its output shown while it works, its exits understood.

It ends with status 0 where an upload is refused, tries for ever where nothing answers, and prints what a user cannot
act on; here each end is either its output or an InputError of one line that says what to do.
"""

import contextlib
import logging
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.errors import InputError
from common.kaggle import credentials

log = logging.getLogger(__name__)
INSTALL = 'python -m pip install "kaggle>=2.2,!=2.2.5" six'
PATIENCE = 300.0  # seconds without a word and without a byte, after which the client is stopped
AGAIN = "what has arrived is kept, the same command continues"
_BAR = re.compile(r"\d+%\|")
_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_STATUS = re.compile(r"\b([45]\d\d) (?:Client|Server) Error")
_NOISE = re.compile(r"Warning: |Dataset URL|License\(s\)|Downloading |Using competition|Retry |Retrying |Resuming ")
_UNREACHABLE = re.compile(
    r"Max retries exceeded|NameResolution|Failed to establish|Connection (?:refused|reset|aborted)|ConnectionError|"
    r"RemoteDisconnected|ProxyError|SSLError|ConnectTimeout|ReadTimeout|Read timed out|IncompleteRead|InvalidChunk"
)
_REFUSED = re.compile(  # said with status 0
    r"^(Could not submit to competition|Could not find competition|Upload unsuccessful|Upload of .* expired|"
    r"(Kernel push|Dataset creation|Dataset version creation) error)",
    re.M,
)


def run(args, target, watch=None, needs_account=True):
    """Run `kaggle` with `args` and return what it said, without progress bars and secrets.

    target: the competition or dataset in an error's words, `competition a-slug`. watch: a file that grows while the
    client works. Raises InputError, in one line, where the client is missing, hangs, or ends without having done it.
    """
    program, secrets = _program(), credentials.prepare(needs_account)
    status, lines = _follow([program, *args], secrets, target, watch)
    said = "\n".join(lines)
    if status or _REFUSED.search(said):
        raise InputError(explain(said, status, target))
    return said


def _program():
    beside = Path(sys.executable).with_name("kaggle")
    found = str(beside) if beside.is_file() else shutil.which("kaggle")
    if found is None:
        raise InputError(f"the kaggle client is not installed: {INSTALL}")
    return found


def _environment():
    """The variables of the client: as they are, but that it must not print requests with their headers."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VERBOSE", "VERBOSE_OUTPUT")}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def _follow(command, secrets, target, watch):
    """Run the command to its end, showing its bars; returns its status and its other lines, scrubbed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(),
        start_new_session=True,
    )
    bar, lines, rest, size, heard = _Bar(), [], b"", -1, time.monotonic()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(min(1.0, PATIENCE)):
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    if not chunk:
                        break
                    heard = time.monotonic()
                    *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
                    for line in whole:
                        _take(credentials.scrub(line.decode(errors="replace").strip(), secrets), lines, bar, target)
                now = watch.stat().st_size if watch is not None and watch.exists() else -1
                if now != size:
                    size, heard = now, time.monotonic()
                if time.monotonic() - heard > PATIENCE:
                    raise InputError(f"{target}: Kaggle has not answered for {PATIENCE:.0f} seconds; {AGAIN}")
        _take(credentials.scrub(rest.decode(errors="replace").strip(), secrets), lines, bar, target)
        return process.wait(), lines
    finally:
        bar.close()
        _end(process)


def _take(line, lines, bar, target):
    if _BAR.search(line):
        bar.show(line)
    elif line:
        lines.append(line)
        if _FULL.search(line):  # the client would try five more times, for a minute
            raise InputError(f"{target}: the disk is full: {_FULL.search(line)[0]}; make room, {AGAIN}")
        if line.startswith(("Retrying in", "Rate limited", "Resuming from", "Request failed")):
            log.info(line)


def _end(process):
    """Stop the client and what it started, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    process.stdout.close()


class _Bar:
    """The client's progress bar: moving on a terminal, now and then a line elsewhere."""

    def __init__(self):
        self._live, self._last, self._shown = sys.stderr.isatty(), time.monotonic(), False

    def show(self, line):
        if self._live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif time.monotonic() - self._last > 15:
            self._last = time.monotonic()
            log.info(line)

    def close(self):
        if self._shown:
            print(file=sys.stderr)


def explain(said, status, target):
    """What the client's end means, and what to do, in one line. target: `competition <slug>` or `dataset <slug>`."""
    kind, _, slug = target.partition(" ")
    lines = [line for line in said.splitlines() if not _NOISE.match(line)]
    last = " ".join((lines[-1] if lines else "no reason given").split())[:300]
    coded = _STATUS.findall(said)
    code = int(coded[-1]) if coded else 0
    if "Authentication required" in said or code == 401 or "Unauthenticated" in said:
        places = ", ".join(credentials.places())
        refused = f"Kaggle does not accept the credentials in {places}" if places else "Kaggle asks for an account"
        return f"{target}: {refused}; {credentials.HOW}"
    if "ModuleNotFoundError" in said or "ImportError" in said:
        return f"the kaggle client cannot start ({last}): {INSTALL}"
    denied = code == 403 or re.search(r"(?i)\brules\b|was denied|forbidden", said)
    if kind == "competition" and denied:
        address = f"https://www.kaggle.com/competitions/{slug}/rules"
        return f"{target}: not allowed before its rules are accepted: open {address}, join, and run this again"
    if denied:
        return f"{target}: Kaggle does not allow it (403): is the name right, is it private, is the account verified?"
    if code == 404 or re.search(r"(?im)^not found|could not find competition", said):
        return f"{target}: Kaggle knows no such {kind}, or it is private: https://www.kaggle.com/search?q={slug}"
    if code == 429 or re.search(r"(?i)too many requests", said):
        return f"{target}: too many requests for Kaggle's limit (429): wait some minutes; {AGAIN}"
    if code >= 500:
        return f"{target}: Kaggle has a fault of its own ({code}): try again later; {AGAIN}"
    if _UNREACHABLE.search(said):
        reason = _UNREACHABLE.search(said)[0]
        return f"{target}: the connection to Kaggle failed ({reason}): is there internet here? {AGAIN}"
    if re.search(r"(?m)^(usage|kaggle.*error): .*", said) and "invalid choice" in said + last:
        return f"the kaggle client is too old or too new for this ({last}): {INSTALL}"
    return f"{target}: {last}" + (f" (the client ended with status {status})" if status else "")
