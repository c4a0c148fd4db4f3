"""The real client in process: its failures in one line, its credentials found, closed to others and never shown."""

import base64
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from common.errors import InputError
from common.kaggle import client
from common.kaggle.client import TransientError, connect, explain
from tests.kaggle_server import KEY, SIGNATURE, TOKEN, USER

COMPETITION, DATASET = "competition a-slug", "dataset me/a-set"
LOGIN = base64.b64encode(f"{USER}:{KEY}".encode()).decode()


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.fixture
def logged(monkeypatch):
    """The lines that the client logs."""
    lines = []
    monkeypatch.setattr(client.log, "info", lines.append)
    monkeypatch.setattr(client.log, "warning", lines.append)
    return lines


# ---- failures ------------------------------------------------------------------------------------------------------


def http_error(status, message="no"):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(message, response=response)


@pytest.mark.parametrize(
    "target, error, line",
    [
        (COMPETITION, http_error(401), "does not accept the credentials in .*kaggle.json"),
        (COMPETITION, http_error(403), "accept its rules at https://www.kaggle.com/competitions/a-slug/rules"),
        (DATASET, http_error(403, "denied"), r"not allowed .denied.: is the name right, is it private"),
        (COMPETITION, http_error(404), "knows no such competition"),
        (DATASET, http_error(404), "knows no such dataset"),
        (DATASET, OSError(28, "No space left on device"), "the disk is full; make room"),
        (COMPETITION, http_error(400, "daily\nallowance"), "a-slug: daily allowance"),
        (COMPETITION, KeyError("username"), "a-slug: 'username'"),
        (COMPETITION, ValueError(), "a-slug: ValueError"),
        (DATASET, ValueError(f"https://x/y?{SIGNATURE} {KEY}"), r"a-set: https://x/y\?… …$"),
    ],
)
def test_an_error_is_one_line_with_its_remedy(home, target, error, line):
    with pytest.raises(InputError, match=line) as caught, connect(target):
        raise error
    assert "\n" not in str(caught.value) and not isinstance(caught.value, TransientError)


@pytest.mark.parametrize(
    "error, line",
    [
        (http_error(429), "too many requests .429.: wait some minutes; what has arrived is kept"),
        (http_error(503), "internal error .503.: try again later"),
        (requests.ConnectionError("Max retries exceeded"), "connection to Kaggle failed .ConnectionError."),
        (requests.ReadTimeout("x"), "connection to Kaggle failed .ReadTimeout."),
    ],
)
def test_errors_that_may_pass(error, line):
    found = explain(error, COMPETITION)
    assert isinstance(found, TransientError)
    with pytest.raises(InputError, match=line):
        raise found


def test_a_missing_client(home, monkeypatch):
    client._client_class.cache_clear()
    monkeypatch.setitem(sys.modules, "kaggle.api.kaggle_api_extended", None)
    with pytest.raises(InputError, match=r'cannot be imported .*: python -m pip install "kag'), connect(COMPETITION):
        pass


def test_timeouts_and_loggers_are_as_before(home):
    send, level = requests.adapters.HTTPAdapter.send, logging.getLogger("urllib3").level
    with connect(COMPETITION):
        assert requests.adapters.HTTPAdapter.send is not send
    assert requests.adapters.HTTPAdapter.send is send and logging.getLogger("urllib3").level == level


# ---- output --------------------------------------------------------------------------------------------------------


def test_bars_go_to_stderr_and_lines_to_the_log(home, logged, capsys):
    with connect(COMPETITION):
        print(f"hello {KEY}\n", file=sys.stderr)
        print("\r 10%|#", end="", file=sys.stderr)
        print("\r 99%|#", end="", file=sys.stderr)
        print("end")
    assert logged == ["hello …", "end"] and capsys.readouterr() == ("", "\r 10%|#\r 99%|#\n")


def test_no_request_is_printed_with_its_headers(server, home, monkeypatch, logged, capfd, caplog):
    """VERBOSE makes the client print them; urllib3 logs the signed addresses that it tries again."""
    monkeypatch.setenv("VERBOSE", "1")
    client._client_class.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)
    server.competitions["a-slug"] = b""
    server.lose("PUT")
    (home / "x.csv").write_text("a,b\n")
    with connect(COMPETITION) as api:
        assert "--verbose" not in api.args
        api.competition_submit(str(home / "x.csv"), "first", "a-slug")
    client._client_class.cache_clear()
    assert len(server.asked("PUT")) == 2 and server.submissions[0]["content"] == b"a,b\n"
    said = capfd.readouterr()
    for secret in (KEY, LOGIN, SIGNATURE.split("=")[1]):
        assert secret not in said.out + said.err + "".join(logged) + caplog.text


def test_scrub():
    text = (
        f"Authorization: Basic abc=\n{KEY} https://user:pw@proxy:80/x?X-Goog-Signature=12&a=b "
        "Max retries exceeded with url: /upload/1?sig=2 (Caused by Bearer KGAT_x.y)"
    )
    assert client.scrub(text, [KEY]) == (
        "Authorization: Basic …\n… https://…@proxy:80/x?… "
        "Max retries exceeded with url: /upload/1?… (Caused by Bearer …)"
    )


# ---- credentials ---------------------------------------------------------------------------------------------------


def secrets_of(**options):
    with connect(COMPETITION, **options):
        return list(sys.stdout.secrets)


def test_no_credentials(home):
    (home / ".kaggle/kaggle.json").unlink()
    with pytest.raises(InputError, match="no Kaggle credentials found: make a token at https:"):
        secrets_of()
    assert secrets_of(needs_account=False) == []


def test_credentials_in_every_place(home, monkeypatch):
    assert secrets_of() == [LOGIN, KEY]
    (home / ".kaggle/kaggle.json").unlink()
    for name in ("access_token", "access_token.txt"):
        (home / ".kaggle" / name).write_text(TOKEN + "\n")
        assert TOKEN in secrets_of() and mode(home / ".kaggle" / name) == 0o600
        (home / ".kaggle" / name).unlink()
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    assert TOKEN in secrets_of()
    (home / "token").write_text(TOKEN)
    monkeypatch.setenv("KAGGLE_API_TOKEN", str(home / "token"))
    assert TOKEN in secrets_of() and mode(home / "token") == 0o600
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    with pytest.raises(InputError, match="credentials in KAGGLE_KEY, or they are incomplete"):
        secrets_of()
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    assert {LOGIN, KEY} <= set(secrets_of())


@pytest.mark.parametrize("text", ["", "{", '{"username": "chest"}', json.dumps({"key": KEY})])
def test_an_unusable_kaggle_json(home, text, capfd):
    (home / ".kaggle/kaggle.json").write_text(text)
    with pytest.raises(InputError, match=r"kaggle\.json, or they are incomplete; make a token") as caught:
        secrets_of()
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_files_open_to_others_are_closed(home, monkeypatch, logged):
    path = home / ".kaggle/kaggle.json"
    path.chmod(0o644)
    secrets_of()
    secrets_of()
    assert mode(path) == 0o600 and logged == [f"{path}: other users could read it; now only you can (mode 600)"]
    path.chmod(0o640)

    def refuse(*words):
        raise PermissionError  # as on a mount of another system

    monkeypatch.setattr(client.os, "chmod", refuse)
    secrets_of()
    assert "(mode 640), and its mode cannot be changed: move it" in logged[1]


def test_the_server_runs_by_itself(tmp_path):
    program = Path(__file__).parents[2] / "kaggle_server.py"
    with subprocess.Popen([sys.executable, program], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith("export http_proxy=http://127.0.0.1:")
        finally:
            process.kill()
