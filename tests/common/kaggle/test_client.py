"""How the client ends, played by a script in its place; the real one is run in test_download and test_upload."""

import time

import pytest

from common.errors import InputError
from common.kaggle import client
from tests.kaggle_server import KEY

SLUG, SET = "competition a-slug", "dataset me/a-set"


@pytest.fixture
def play(home, tmp_path, monkeypatch):
    """`play(script)`: runs it in the client's place."""
    program = tmp_path / "kaggle"

    def run(script, target=SLUG, **options):
        program.write_text("#!/bin/bash\n" + script)
        program.chmod(0o755)
        monkeypatch.setattr(client, "_program", lambda: str(program))
        return client.run(["words"], target, **options)

    return run


def test_output_without_bars_and_secrets_and_no_verbose_mode(play, monkeypatch):
    monkeypatch.setenv("VERBOSE", "1")
    said = play(
        f'echo "hello ${{VERBOSE}}{KEY} $1 $2"; printf "\\r 10%%|# | 1/10\\r 99%%|### | 9/10\\n" >&2; printf end'
    )
    assert said == "hello … words\nend"


@pytest.mark.parametrize(
    "target, said, line",
    [
        (SLUG, "Authentication required to call the Kaggle API.", "does not accept the credentials in .*kaggle.json"),
        (
            SLUG,
            "403 Client Error: Forbidden for url: https://x",
            "open https://www.kaggle.com/competitions/a-slug/rules",
        ),
        (
            SLUG,
            "You must accept this competition's rules before",
            "open https://www.kaggle.com/competitions/a-slug/rules",
        ),
        (SLUG, "Permission 'competitions.participate' was denied", "competitions/a-slug/rules"),
        (SET, "Permission 'datasets.get' was denied", "does not allow it .403.: is the name right, is it private"),
        (SLUG, "404 Client Error: Not Found for url: https://x", "knows no such competition"),
        (SET, "Not found", "knows no such dataset"),
        (SLUG, "429 Client Error: Too Many Requests for url: x", "limit .429.: wait some minutes; what has arrived"),
        (SLUG, "503 Server Error: Service Unavailable for url: x", "fault of its own .503.: try again later"),
        (
            SLUG,
            "HTTPSConnectionPool(host='api.kaggle.com', port=443): Max retries exceeded with url: /v1/x (Caused by "
            "NameResolutionError('x'))",
            "connection to Kaggle failed .Max retries exceeded.: is there internet here",
        ),
        (SLUG, "Traceback (most recent call last):\nModuleNotFoundError: No module named 'six'", "pip install"),
        (SLUG, "usage: kaggle [-h]\nkaggle: error: argument command: invalid choice: 'x'", "too old or too new"),
        (SLUG, "Traceback (most recent call last):\n  File x\nKeyError: 'username'", "a-slug: KeyError: 'username'"),
        (SLUG, "", "no reason given .the client ended with status 1"),
    ],
)
def test_every_error_is_one_line_with_what_to_do(play, tmp_path, target, said, line):
    (tmp_path / "said").write_text(said)
    with pytest.raises(InputError, match=line) as caught:
        play(f"cat {tmp_path}/said; exit 1", target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        "Could not submit to competition",
        "Kernel push error: Notebook not found",
        "Dataset creation error: no",
        "Upload unsuccessful: a.whl",
        "Dataset version creation error: no",
    ],
)
def test_refusals_with_status_0(play, said):
    with pytest.raises(InputError, match=said):
        play(f"echo 'Starting'; echo '{said}'")


def test_words_of_the_user_are_no_error(play):
    assert play("""echo '  "description": "Kernel push error: fixed"'""").endswith('fixed"')


def test_a_client_that_hangs_is_ended_with_its_children(play, monkeypatch, tmp_path):
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    start = time.monotonic()
    with pytest.raises(InputError, match="a-slug: Kaggle has not answered for 0 seconds; what has arrived is kept"):
        play(f"(trap '' TERM; sleep 3; touch {tmp_path}/alive) & echo begun; sleep 30")
    assert time.monotonic() - start < 10


def test_a_file_that_grows_is_a_sign_of_life(play, monkeypatch, tmp_path):
    monkeypatch.setattr(client, "PATIENCE", 1.5)
    script = f"for k in 1 2 3 4 5 6 7 8; do echo x >> {tmp_path}/grows; sleep 0.4; done; echo done"
    assert play(script, watch=tmp_path / "grows") == "done"


def test_a_full_disk_is_said_at_once(play):
    start = time.monotonic()
    with pytest.raises(InputError, match="the disk is full: No space left on device; make room"):
        play("echo 'Connection error: OSError: [Errno 28] No space left on device'; sleep 30")
    assert time.monotonic() - start < 10


def test_a_missing_client(home, monkeypatch, tmp_path):
    monkeypatch.setattr(client.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r'not installed: python -m pip install "kaggle>=2\.2,!=2\.2\.5" six'):
        client.run(["words"], SLUG)
