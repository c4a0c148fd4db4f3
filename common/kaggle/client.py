"""Kaggle's own client with sign-in, timeouts and one-line errors without secrets; only `connect` imports the client."""

import base64
import contextlib
import errno
import functools
import io
import logging
import os
import re
import shutil
import stat
import sys
from pathlib import Path

from common.errors import InputError, check, log

INSTALL = 'python -m pip install "kaggle>=2.2,!=2.2.5" six'
CREDENTIALS = (
    "make a token at https://www.kaggle.com/settings/api and save it as ~/.kaggle/access_token, or set "
    "KAGGLE_API_TOKEN, or put the older kaggle.json into ~/.kaggle"
)
AGAIN = "what has arrived is kept; run the same command to continue"
TIMEOUT = 120.0  # seconds without a byte; the client itself would wait forever
_VARIABLES = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")
_QUERY = re.compile(r"(https?://[^\s?'\"]+|url: [^\s?'\"]+|/[^\s?'\"]+)\?[^\s'\"]+")  # anyone can use signed URLs
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_HEADER = re.compile(r"(?i)\b(basic|bearer)\s+[\w.~+/=-]+")


class TransientError(InputError):
    """Kaggle could not be reached, is overloaded or failed: the same request may succeed later."""


@contextlib.contextmanager
def connect(target, needs_account=True):
    """Yield a signed-in `KaggleApi`; its failures become InputErrors about `target`, such as `competition a-slug`.

    needs_account: False allows missing credentials. TransientError if trying again later may help.
    """
    output = _Output()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            with _timeouts():
                yield _sign_in(output, needs_account)
        except InputError:
            raise
        except ImportError as error:
            raise InputError(f"the kaggle client cannot be imported ({error}): {INSTALL}") from None
        except Exception as error:
            raise explain(error, target, output.secrets) from None


@functools.cache
def _client_class():
    """Return a subclass of the client that checks silent failures and never prints request headers."""
    verbose = {name: os.environ.pop(name) for name in ("VERBOSE", "VERBOSE_OUTPUT") if name in os.environ}
    try:
        from kaggle.api.kaggle_api_extended import KaggleApi
    finally:
        os.environ.update(verbose)

    class Client(KaggleApi):
        already_printed_version_warning = True

        def download_needed(self, response, outfile, quiet=True):
            """Raise InputError for an unexpected name in Kaggle's answer, and for a disk without room."""
            check(outfile.endswith(".zip"), f"{outfile}: Kaggle did not send a zip")
            have = os.path.getsize(outfile) if os.path.isfile(outfile) else 0
            need = int(response.headers.get("Content-Length", 0)) - have
            free = shutil.disk_usage(Path(outfile).parent).free
            if need > free:
                sizes = f"needs {need / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free"
                raise InputError(f"{outfile}: {sizes}; make room, {AGAIN}")
            return super().download_needed(response, outfile, quiet)

        def upload_files(self, request, resources, folder, *options):
            """Raise TransientError if a file was refused; the client would publish the dataset without it."""
            super().upload_files(request, resources, folder, *options)
            expected = sum(name != self.DATASET_METADATA_FILE for name in os.listdir(folder))
            if len(request.files) != expected:
                taken = f"Kaggle took {len(request.files)} of {expected} files"
                raise TransientError(f"{folder}: {taken}, nothing is published; {AGAIN}")

    return Client


def _sign_in(output, needs_account):
    silence = contextlib.redirect_stdout(io.StringIO())  # the client prints a page of advice
    with silence:
        api = _client_class()()
    places = _secure_credentials(api.config)
    if needs_account or places:
        check(places, f"no Kaggle credentials found: {CREDENTIALS}")
        output.secrets = [os.environ[name] for name in _VARIABLES if os.environ.get(name)]
        try:
            with silence:
                api.authenticate()
        except SystemExit:
            raise InputError(_refused(places)) from None
        values = {name: str(api.config_values.get(name) or "") for name in ("username", "key", "token")}
        login = base64.b64encode(f"{values['username']}:{values['key']}".encode()).decode()
        output.secrets += [text for text in (values["token"], login, values["key"]) if len(text) >= 6]
    return api


def _refused(places):
    return f"Kaggle does not accept the credentials in {', '.join(places)}, or they are incomplete; {CREDENTIALS}"


def _secure_credentials(config):
    """Make credential files private to the user; return where credentials are: files and environment variables."""
    home = Path.home() / ".kaggle"
    names = ("kaggle.json", "access_token", "access_token.txt", "credentials.json")
    paths = dict.fromkeys([config, *(str(home / name) for name in names), os.environ.get("KAGGLE_API_TOKEN", "")])
    found = [path for path in paths if os.path.isfile(path)]
    for path in found:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o077:
            try:
                os.chmod(path, 0o600)
                log.info(f"{path}: other users could read it; now only you can (mode 600)")
            except OSError:
                log.warning(f"{path}: other users may read it (mode {mode:o}), and its mode cannot be changed: move it")
    return [*found, *(name for name in _VARIABLES if os.environ.get(name))]


@contextlib.contextmanager
def _timeouts():
    """Give every request a timeout, and keep urllib3 from logging signed URLs on retries."""
    from requests.adapters import HTTPAdapter  # late: it comes with the client

    send, logger = HTTPAdapter.send, logging.getLogger("urllib3")
    level = logger.level

    def send_in_time(adapter, request, stream=False, timeout=None, **options):
        return send(adapter, request, stream=stream, timeout=timeout or TIMEOUT, **options)

    HTTPAdapter.send = send_in_time
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        HTTPAdapter.send = send
        logger.setLevel(level)


class _Output(io.TextIOBase):
    """Replacement for stdout and stderr: passes progress bars on and logs other lines, without secrets."""

    def __init__(self):
        self.secrets, self._stdout, self._stderr, self._bar = [], sys.stdout, sys.stderr, False

    def write(self, text):
        lines = [line.strip() for line in scrub(text, self.secrets).splitlines() if line.strip()]
        if text.startswith("\r"):
            self._stderr.write(text)
        elif self._bar and text:
            self._stderr.write("\n")
        self._bar = text.startswith("\r") or (self._bar and not text)
        if not self._bar:
            with contextlib.redirect_stdout(self._stdout):
                for line in lines:
                    log.info(line)
        return len(text)

    def flush(self):
        self._stderr.flush()


def scrub(text, secrets=()):
    """Return `text` without the secrets, authorization headers, and logins and signatures in URLs."""
    for secret in secrets:
        text = text.replace(secret, "…")
    return _HEADER.sub(r"\1 …", _LOGIN.sub("…@", _QUERY.sub(r"\1?…", text)))


def explain(error, target, secrets=()):
    """Return the one-line InputError for an exception of the client; TransientError if a retry may help."""
    from requests import RequestException  # late: it comes with the client

    kind, _, slug = target.partition(" ")
    status = getattr(getattr(error, "response", None), "status_code", 0)
    reason = " ".join(scrub(str(error), secrets).split())[:300] or type(error).__name__
    if status == 401:
        places = _secure_credentials(_client_class().config)
        return InputError(f"{target}: {_refused(places) if places else f'Kaggle asks for an account: {CREDENTIALS}'}")
    if status == 403:
        remedy = "is the name right, is it private, is the account verified?"
        if kind == "competition":
            remedy = f"join it and accept its rules at https://www.kaggle.com/competitions/{slug}/rules, then run again"
        return InputError(f"{target}: not allowed ({reason}): {remedy}")
    if status == 404:
        address = f"https://www.kaggle.com/search?q={slug}"
        return InputError(f"{target}: Kaggle knows no such {kind}, or it is private: {address}")
    if status == 429:
        return TransientError(f"{target}: too many requests (429): wait some minutes; {AGAIN}")
    if status >= 500:
        return TransientError(f"{target}: Kaggle has an internal error ({status}): try again later; {AGAIN}")
    if status == 0 and isinstance(error, RequestException):
        return TransientError(f"{target}: the connection to Kaggle failed ({type(error).__name__}): {AGAIN}")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{target}: the disk is full; make room, {AGAIN}")
    return InputError(f"{target}: {reason}")
