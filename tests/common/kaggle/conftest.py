"""The real client against the local server, in a folder and a home of the test's own."""

import io
import os
import stat
import tempfile
import zipfile

import pytest

from common.kaggle import client, upload
from tests.kaggle_server import KEY, SIGNATURE, TOKEN, KaggleServer

SECRETS = (KEY, TOKEN, SIGNATURE.split("=")[1])


@pytest.fixture(scope="session")
def make_zip():
    """`make_zip(files)`: the bytes of a zip; a name that ends in ! becomes a link to its content."""
    return _make_zip


def _make_zip(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name.rstrip("!"), (2024, 2, 3, 4, 5, 6))
            entry.compress_type = compression
            entry.external_attr = (stat.S_IFLNK if name.endswith("!") else stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


@pytest.fixture
def server():
    with KaggleServer() as running:
        yield running


@pytest.fixture
def home(server, tmp_path, monkeypatch):
    """A home with a kaggle.json, variables that lead the client to the server, short waits; the test runs in work/."""
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    for name, value in server.environment(folder).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    from kaggle.api.kaggle_api_extended import KaggleApi  # it reads the variables when it is imported first

    monkeypatch.setattr(KaggleApi, "config", str(folder / ".kaggle" / "kaggle.json"))
    monkeypatch.setattr(KaggleApi, "args", ["--local"])
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # where it notes begun uploads
    monkeypatch.setattr(client, "TIMEOUT", 60.0)
    monkeypatch.setattr(upload, "POLL", 0.1)
    monkeypatch.setattr(upload, "ARRIVAL", 0.5)
    return folder


@pytest.fixture
def command(home, capfd):
    """`command(*words)`: runs `python -m solutions …`; returns status, output and errors, both checked for secrets."""
    from solutions.__main__ import main

    def run(*words):
        capfd.readouterr()
        status = main([str(word) for word in words])
        said = capfd.readouterr()
        for secret in SECRETS:
            assert secret not in said.out + said.err
        return status, said.out, said.err.strip()

    return run


@pytest.fixture
def refused(command):
    """`refused(*words)`: asserts that the command ends in one line, status 2, and returns the line."""

    def run(*words):
        status, _, errors = command(*words)
        lines = [line for line in errors.splitlines() if line.strip() and "%|" not in line]  # no progress bars
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (status, errors)
        return lines[0]

    return run
