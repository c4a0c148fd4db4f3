"""`push`, `pull` and `infer hf://…` against a local stand-in of the Hugging Face hub."""

import shutil

import pytest
from huggingface_hub import ModelCard, constants

from common import hub
from common.cli import VERBS, run_tool
from common.config import file_hash
from common.errors import InputError
from common.export import export_tool, infer_tool
from common.hub import pull, push_tool
from common.paths import read_json, write_json
from common.trained import Card, Trained
from tests.hub_server import TOKEN, HubServer
from tests.toy import TOY, Config, make_job, write_data

push = push_tool(lambda name: Card("image-classification", "Toy images", "Anybody may use them."))
WEIGHTS = ["fold0-net.safetensors", "fold1-net.safetensors"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder with a finished run, `run`, its `data` and its `exported` folder."""
    root = tmp_path_factory.mktemp("finished")
    write_data(root / "data")
    for name in list(VERBS)[:-1]:  # all but `report`
        job = make_job(root / "run", data=root / "data")
        TOY.verbs()[name](job)
        job.run.close()
    export_tool(TOY, Config)(root / "run", out=root / "exported")
    return root


@pytest.fixture
def exported(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished / "exported", tmp_path / "exported")


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet's protocol is another one than the hub's
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_an_export_goes_up_and_comes_back(exported, server, tmp_path, caplog, capfd):
    caplog.set_level("INFO", "common")
    push(exported, repo="you/toys")
    assert set(server.repos["you/toys"]) == {*WEIGHTS, "trained.json", "README.md"}
    assert server.visibility == {"you/toys": "private"}
    assert "4 files in " in caplog.text and "`infer hf://you/toys` predicts from them" in caplog.text
    pull("you/toys", out=tmp_path / "back")
    assert {p.name: file_hash(p) for p in exported.iterdir()} == {
        p.name: file_hash(p) for p in (tmp_path / "back").iterdir() if p.name != "README.md"
    }
    assert Trained.open(tmp_path / "back", "toy").rule == Trained.open(exported).rule
    push(exported, repo="you/open", public=True)
    assert server.visibility["you/open"] == "public"
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


def test_the_card_says_what_the_model_is(exported, server):
    about = read_json(exported / "trained.json")
    about |= {"score": {"metric": "accuracy", "estimate": 0.75, "low": 0.5, "high": 1.0}, "git": "abc1234+"}
    about, toys = about | {"command": "toy run demo"}, Card("image-classification", "D", "L")
    card = ModelCard(hub.write_card(about | {"synthetic": False}, toys, "a/b").decode())
    data = card.data.to_dict()
    assert (data["license"], data["pipeline_tag"]) == ("other", "image-classification")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("D", "accuracy", 0.75)
    assert result.metric_args == {"low": 0.5, "high": 1.0}
    for line in (
        "# toy demo",
        "- Data: D",
        "- Licence of the data: L",
        "- Score: accuracy 0.7500 [0.5000, 1.0000], 95 % interval, out of fold on the training data",
        "- Code: abc1234+",
        "- Command: `cxr toy run demo`",
        "cxr toy infer hf://a/b --test FOLDER",
    ):
        assert line in card.text.splitlines()
    synthetic = hub.write_card(about | {"synthetic": True}, toys, "a/b").decode()
    assert "- Data: generated phantoms\n" in synthetic and "Licence of" not in synthetic
    boxes = hub.write_card(about | {"facts": {"task": "detection"}}, toys, "a/b").decode()
    assert ModelCard(boxes).data.pipeline_tag == "object-detection"
    (exported / "README.md").write_text("# my own card\n")
    push(exported, repo="you/toys")
    assert server.repos["you/toys"]["README.md"] == b"# my own card\n"


def test_a_push_replaces_the_earlier_export(exported, server, tmp_path, caplog):
    caplog.set_level("INFO", "common")
    push(exported, repo="you/toys")
    server.repos["you/toys"]["mine.txt"] = b"kept"
    pull("you/toys", out=tmp_path / "back")
    push(tmp_path / "back", repo="you/toys")
    assert "another export" not in caplog.text
    about = read_json(tmp_path / "back" / "trained.json")
    about["files"].pop(WEIGHTS[1])
    write_json(tmp_path / "back" / "trained.json", about | {"preset": "other"})
    push(tmp_path / "back", repo="you/toys")
    found = server.repos["you/toys"]
    assert set(found) == {WEIGHTS[0], "trained.json", "README.md", "mine.txt"}
    assert b"# toy other" in found["README.md"] and "README.md: describes another export" in caplog.text


def test_inference_from_the_hub_gives_the_runs_submission(exported, finished, server, tmp_path, capsys):
    push(exported, repo="you/toys", public=True)
    infer = infer_tool(TOY, Config)
    line = ["hf://you/toys", "--data", str(finished / "data"), "--workers", "0", "--out", "s.csv"]
    assert run_tool("toy infer", lambda: infer, line) == 0, capsys.readouterr().err
    assert (tmp_path / "s.csv").read_bytes() == (finished / "run" / "submission.csv").read_bytes()
    server.requests.clear()
    assert run_tool("toy infer", lambda: infer, line) == 0
    assert [path for method, path in server.requests if method == "GET"] == ["/api/models/you/toys"]  # from the cache


def test_damaged_and_foreign_repositories_are_refused(exported, server, tmp_path):
    push(exported, repo="you/toys")
    files = server.repos["you/toys"]
    files["secret.bin"] = b"never asked for"
    good, files[WEIGHTS[0]] = files[WEIGHTS[0]], b"x" * len(files[WEIGHTS[0]])
    with pytest.raises(InputError, match=r"fold0-net\.safetensors: not the file that was exported"):
        pull("you/toys", out=tmp_path / "back")
    del files[WEIGHTS[0]]
    with pytest.raises(InputError, match=r"^you/toys: not an export: it has no trained\.json, or lacks a file of it$"):
        pull("you/toys", out=tmp_path / "back")
    files[WEIGHTS[0]] = good
    about = read_json(exported / "trained.json")
    write_json(tmp_path / "t.json", about | {"files": {"../../x": "0"}})
    files["trained.json"] = (tmp_path / "t.json").read_bytes()
    with pytest.raises(InputError, match="not a usable id"):
        pull("you/toys", out=tmp_path / "back")
    assert not (tmp_path / "back").exists() and not [path for _, path in server.requests if "secret" in path]


def test_each_refusal_of_the_hub_is_one_line(exported, server, tmp_path, monkeypatch):
    unknown = "no such repository for this account; log in with `hf auth login`, or set HF_TOKEN"
    with pytest.raises(InputError, match=f"^you/none: {unknown}"):
        pull("you/none", out=tmp_path / "back")
    for repo in ("toys", "you/toys/x", "you/to ys"):
        with pytest.raises(InputError, match="name a repository of the hub as you/name"):
            push(exported, repo=repo)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=f"^you/toys: {unknown}") as caught:
        push(exported, repo="you/toys")
    assert "hf_wrong" not in str(caught.value) and "\n" not in str(caught.value)
    (exported / WEIGHTS[0]).write_bytes(b"other")
    with pytest.raises(InputError, match="not the file that was exported"):
        push(exported, repo="you/toys")
    assert not server.repos
