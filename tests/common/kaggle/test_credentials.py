"""Credentials: where they are found, closed, and never shown."""

import base64
import json

import pytest

from common.errors import InputError
from common.kaggle import credentials
from tests.kaggle_server import KEY, TOKEN, USER


def mode(path):
    return path.stat().st_mode & 0o777


def test_none_at_all(home):
    (home / ".kaggle/kaggle.json").unlink()
    with pytest.raises(InputError, match="no Kaggle credentials found: make a token at https:"):
        credentials.prepare()
    assert credentials.prepare(needed=False) == []


def test_every_place(home, monkeypatch):
    basic = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
    assert credentials.prepare() == [basic, KEY]
    (home / ".kaggle/kaggle.json").unlink()
    for name in ("access_token", "access_token.txt"):
        (home / ".kaggle" / name).write_text(TOKEN + "\n")
        assert credentials.prepare() == [TOKEN]
        (home / ".kaggle" / name).unlink()
    (home / ".kaggle/credentials.json").write_text(json.dumps({"refresh_token": "refresh-me", "access_token": None}))
    assert credentials.prepare() == ["refresh-me"] and mode(home / ".kaggle/credentials.json") == 0o600
    (home / ".kaggle/credentials.json").unlink()
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    assert credentials.prepare() == [TOKEN]
    (home / "token").write_text("in-a-file")
    monkeypatch.setenv("KAGGLE_API_TOKEN", str(home / "token"))
    assert "in-a-file" in credentials.prepare()
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    with pytest.raises(InputError, match="KAGGLE_USERNAME is not"):
        credentials.prepare()
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    assert credentials.prepare() == [basic, KEY]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"username": "chest"}', '{"username": "", "key": "abcdefgh"}'])
def test_a_kaggle_json_that_is_none(home, text):
    (home / ".kaggle/kaggle.json").write_text(text)
    with pytest.raises(
        InputError, match=r"kaggle\.json: (not what Kaggle gives|has no username and key); make a token"
    ):
        credentials.prepare()


def test_open_files_are_closed_with_a_line(home, monkeypatch):
    said = []
    monkeypatch.setattr(credentials.log, "info", said.append)
    monkeypatch.setattr(credentials.log, "warning", said.append)
    path = home / ".kaggle/kaggle.json"
    path.chmod(0o644)
    credentials.prepare()
    credentials.prepare()
    assert mode(path) == 0o600 and said == [f"{path}: other users could read it; now only you can (mode 600)"]
    path.chmod(0o640)
    monkeypatch.setattr(type(path), "chmod", lambda *a: None)  # as on a mount of another system
    credentials.prepare()
    credentials.prepare()
    assert len(said) == 2 and "(mode 640), which cannot be changed here: move it" in said[1]
    assert KEY not in "".join(said)


def test_scrub():
    text = (
        f"Authorization: Basic abc=\n{KEY} https://user:pw@proxy:80/x?X-Goog-Signature=12&a=b "
        "Max retries exceeded with url: /upload/1?sig=2 (Caused by Bearer KGAT_x.y)"
    )
    assert credentials.scrub(text, [KEY]) == (
        "Authorization: Basic …\n… https://…@proxy:80/x?… "
        "Max retries exceeded with url: /upload/1?… (Caused by Bearer …)"
    )
