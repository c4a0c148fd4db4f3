"""The user's Kaggle credentials: found, closed to other users, and kept out of everything that is shown.

Their values are read for one purpose only: to take them out of what the client prints.
"""

import base64
import functools
import json
import logging
import os
import re
import stat
from pathlib import Path

from common.errors import InputError

log = logging.getLogger(__name__)
HOW = (
    "make a token at https://www.kaggle.com/settings/api and save it as ~/.kaggle/access_token, or set "
    "KAGGLE_API_TOKEN, or put the older kaggle.json into ~/.kaggle"
)
_SECRETS = ("KAGGLE_API_TOKEN", "KAGGLE_KEY", "KAGGLE_IAP_TOKEN")  # variables that hold one
_QUERY = re.compile(r"(https?://[^\s?'\"]+|url: [^\s?'\"]+)\?[^\s'\"]+")  # signed addresses open a file to anybody
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_HEADER = re.compile(r"(?i)\b(basic|bearer)\s+[\w.~+/=-]+")


def config_folder():
    """The folder in which the client looks for kaggle.json."""
    named = os.environ.get("KAGGLE_CONFIG_DIR")
    if named:
        return Path(named)
    old = Path.home() / ".kaggle"
    return old if old.exists() else Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"


def files():
    """The files with credentials that are there, in the order in which the client asks them."""
    home, named = Path.home() / ".kaggle", os.environ.get("KAGGLE_API_TOKEN", "")
    places = [Path(value) for value in (named, os.environ.get("KAGGLE_API_V1_TOKEN", "")) if 0 < len(value) < 1000]
    places += [
        home / "access_token",
        home / "access_token.txt",
        config_folder() / "kaggle.json",
        home / "kaggle.json",
        home / "credentials.json",
    ]
    return [path for path in dict.fromkeys(places) if path.is_file()]


def places():
    """Where credentials are, in words: files, and variables."""
    return [*map(str, files()), *(name for name in _SECRETS if os.environ.get(name))]


def prepare(needed=True):
    """Close the files with credentials to other users and return the texts that must not be shown, longest first.

    Raises InputError where there are no credentials and they are `needed`, or a kaggle.json cannot be used.
    """
    found, secrets = files(), {os.environ.get(name, "") for name in _SECRETS}
    for path in found:
        _tighten(path)
        secrets |= _read(path)
    if os.environ.get("KAGGLE_KEY") and os.environ.get("KAGGLE_USERNAME"):
        secrets.add(_basic(os.environ["KAGGLE_USERNAME"], os.environ["KAGGLE_KEY"]))
    elif os.environ.get("KAGGLE_KEY") and not found:
        raise InputError("KAGGLE_KEY is set but KAGGLE_USERNAME is not: the client needs both")
    secrets = {text for text in secrets if len(text) >= 6}
    if needed and not secrets:
        raise InputError(f"no Kaggle credentials found: {HOW}")
    return sorted(secrets, key=len, reverse=True)


def scrub(text, secrets):
    """`text` without the secrets, headers of authorization, log-ins within addresses and signatures behind them."""
    for secret in secrets:
        text = text.replace(secret, "…")
    return _HEADER.sub(r"\1 …", _LOGIN.sub("…@", _QUERY.sub(r"\1?…", text)))


def _tighten(path):
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return
    try:
        path.chmod(0o600)
        done = not stat.S_IMODE(path.stat().st_mode) & 0o077
    except OSError:
        done = False
    if done:
        log.info(f"{path}: other users could read it; now only you can (mode 600)")
    else:
        _complain(path, mode)


@functools.cache  # once is enough
def _complain(path, mode):
    log.warning(
        f"{path}: other users may read it (mode {mode:o}), which cannot be changed here: move it where only "
        "you can, and make a new token if others use this machine"
    )


def _read(path):
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); {HOW}") from None
    if path.suffix != ".json":
        return {text}
    try:
        held = json.loads(text)
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise InputError(f"{path}: not what Kaggle gives; {HOW}")
    if path.name == "kaggle.json":
        user, key = held.get("username"), held.get("key")
        if not (isinstance(user, str) and user and isinstance(key, str) and key):
            raise InputError(f"{path}: has no username and key; {HOW}")
        return {key, _basic(user, key)}
    return {held[name] for name in ("refresh_token", "access_token") if isinstance(held.get(name), str)}


def _basic(user, key):
    return base64.b64encode(f"{user}:{key}".encode()).decode()
