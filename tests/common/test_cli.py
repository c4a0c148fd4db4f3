"""The command line on a toy solution: verbs, presets, exit statuses, signals."""

import logging
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from common import cli
from common.budget import Stopped
from common.cli import Options, parse
from common.config import FitConfig, read_settings, update
from common.errors import InputError, check

log = logging.getLogger("common.test")


@dataclass(frozen=True)
class Net:
    epochs: int = 3
    """How long."""

    def __post_init__(self):
        if self.epochs < 1:
            raise InputError("epochs must be above 0")


@dataclass(frozen=True)
class Config:
    net: Net = Net()
    kind: Literal["a", "b"] = "a"
    tta: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        check(self.seed < 10**9, "seed is too large")


SMALL = Config(Net(1))
MODULE = SimpleNamespace(
    Config=Config, PRESETS={"small": SMALL, "big": Config(Net(9), "b")}, MORE_VERBS={"extra": "do more"}
)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(line, train=…)`: the status, and the verbs called, with their contexts."""
    monkeypatch.chdir(tmp_path)

    def run(line, tools=None, **verbs):
        calls = []

        def verb(name):
            def called(context):
                calls.append((name, context))
                if name in ("prepare", "train"):
                    context.run.write_config(context.solution, context.preset, context.config)
                verbs.get(name, lambda _: None)(context)

            return called

        loaded = {name: verb(name) for name in (*cli.VERBS, "extra", "find_lr")}
        status = cli.main("toy", MODULE, lambda: loaded, line.split(), lambda tool: tools)
        return SimpleNamespace(status=status, names=[n for n, _ in calls], contexts=[c for _, c in calls])

    return run


def test_run_does_every_verb_in_order(command, tmp_path):
    done = command("run small --out r --net.epochs 2 --tta flip scale --device cpu")
    assert done.status == 0 and done.names == list(cli.VERBS)
    context = done.contexts[0]
    assert context.config == Config(Net(2), "a", ("flip", "scale")) and context.preset == "small"
    assert context.device == torch.device("cpu") and context.run.folder.name == "r" and context.workers == 0
    assert (tmp_path / "r" / "log.txt").is_file()
    assert command("extra big").names == ["extra"]
    log_text = (tmp_path / "r" / "log.txt").read_text()
    assert re.search(r"done in 0:00:\d\d; next: cxr toy export r --out FOLDER$", log_text, re.M)
    assert command("train big").contexts[0].run.folder.parts == ("runs", "toy-big")


def test_without_a_preset_the_stored_configuration_is_used(command, capsys):
    command("prepare big --out r --tta flip --workers 3")
    done = command("train --out r --net.epochs 4")
    assert done.contexts[0].config == Config(Net(4), "b", ("flip",)) and done.contexts[0].preset == "big"
    assert done.contexts[0].options.workers is None  # an option of the session, not of the run
    assert command("train").status == command("train --out s").status == 2
    said = "name a preset (small, big), or --out with the folder of a run\n"
    assert capsys.readouterr().err == f"error: {said}error: s: not the folder of a run; {said}"


def test_seeds_and_all_folds_pass_on_what_the_run_was_given(command):
    def leave_out(context):
        context.left_out += context.config.net.epochs == 1

    called = {}
    tools = {name: lambda *folders, **given: called.update(given) or 0 for name in ("blend", "refit")}
    assert command("run small --out r --seeds 1 2", tools, prepare=leave_out).status == 4
    assert str(called.pop("out")) == "r"
    for folds in ("--folds all", "--folds=all"):
        assert command(f"run small --out s {folds} --micro-batch 2 --grad-checkpointing", tools).status == 0
        assert (called.pop("micro_batch"), called.pop("grad_checkpointing")) == (2, True)
    done = command(f"run small --out t --seeds 1 {10**9}", tools)
    assert done.status == 2 and not done.names  # refused before the first seed's run


def test_settings_from_a_file(command, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("net: {epochs: 5}\ntta: [flip]\n")
    done = command("run small --config my.yaml --out r --tta scale")
    assert done.status == 0 and done.contexts[0].config == Config(Net(5), "a", ("scale",))
    assert command("run big --config my.yaml --out s").contexts[0].config == Config(Net(5), "b", ("flip",))
    # a run's config.json names its preset; without one, the settings of --out are the base
    assert command("train --config s/config.json --out t").contexts[0].preset == "big"
    assert command("train --config my.yaml --out r").contexts[0].config == Config(Net(5), "a", ("flip",))
    for preset in ("bigg", "[big]"):
        (tmp_path / "my.yaml").write_text(f"preset: {preset}\n")
        assert command("run --config my.yaml --out u").status == 2
        assert "is not a preset of toy: small, big" in capsys.readouterr().err
    wrong = {
        "net: {epoch: 5}": "net: unknown field 'epoch'",
        "epochs: 5": "unknown field 'epochs'",
        "net: {epochs: many}": "net: epochs cannot be 'many'",
        "net: 5": "net: expected a JSON object, not 5",
        "net: {1: 2, a: 3}": "net: unknown field '1'",
        "solution: siim": "belongs to another solution",
        "- 5": "contains no settings",
        "a: [": "not readable as YAML or JSON",
    }
    for text, message in wrong.items():
        (tmp_path / "my.yaml").write_text(text)
        assert command("run small --config my.yaml").status == 2
        assert f"error: my.yaml: {message}" in capsys.readouterr().err
    assert command("run small --config none.yaml").status == command("train --config my.yaml").status == 2


def test_numbers_in_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nweight_decay: 2.5E-4\nname: e-3\n")
    assert read_settings(tmp_path / "a.yaml") == {"lr": 0.001, "weight_decay": 0.00025, "name": "e-3"}
    assert update(FitConfig(), {"lr": 1e-4, "milestones": [1, 2]}, "x").milestones == (1, 2)


def test_help(command, capsys):
    assert command("").status == command("--help").status == 0
    assert "  extra    do more\n  find_lr  run learning" in (said := capsys.readouterr().out)
    assert "--help):\n  small\n  big\n" in said
    with pytest.raises(SystemExit) as end:
        command("run small --help")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "--net.epochs" in said and "How long" in said and "--on-bad-image" in said and "--normals" not in said
    with pytest.raises(SystemExit):
        command("train --help")
    said = capsys.readouterr().out
    assert "usage: cxr toy train [preset]" in said and "a preset (small, big), --help" in said and "--hours" in said


def test_options_that_save_memory_belong_to_trainings_and_their_plan(command, capsys):
    for verb, shown in (("train", True), ("plan", True), ("predict", False)):
        with pytest.raises(SystemExit):
            command(f"{verb} small --help")
        said = capsys.readouterr().out
        assert [name in said for name in ("--micro-batch", "--grad-checkpointing")] == [shown] * 2
    options = command("train small --out r --grad-checkpointing --micro-batch auto").contexts[0].options
    assert options.grad_checkpointing and options.micro_batch == "auto"
    options = command("train small --out s --micro-batch 4").contexts[0].options
    assert options.micro_batch == 4 and not options.grad_checkpointing
    assert command("train small --out s --micro-batch -1").status == 2
    for text, value in (("auto", "auto"), ("True", True), ("False", False)):
        assert parse(FitConfig(), ["--compile", text], "prog")[1].compile is value
    assert parse(FitConfig(), ["--validate-images", "9"], "prog")[1].validate_images == 9


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # the parser draws its box by the terminal's encoding
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--net.epoch 3", "Unrecognized options: --net.epoch, 3 (did you mean --net.epochs?)"),
        ("--net.epochs x", "--net.epochs: invalid literal for int() with base 10: 'x'"),
        ("--net.epochs 0", "net: epochs must be above 0"),
        ("--kind c", "invalid choice 'c' for argument '--kind'. Expected one of ('a', 'b')."),
        ("--out", "Missing value for argument '--out'. Expected 1 values."),
        ("--workers -1", "--workers must not be negative: -1"),
        ("--hours 0", "--hours must be above 0, not 0"),
        ("--pseudo r --pseudo-weight inf", "--pseudo-weight must be a finite number above 0, not inf"),
        ("--device gpu", "--device 'gpu': choose auto, cpu, cuda or cuda:<n>"),
        ("--device cuda:64", f"--device cuda:64: torch sees {torch.cuda.device_count()} GPUs on this machine"),
    ],
)
def test_invalid_options_are_named(words, said, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding=encoding, isatty=lambda: False, write=len, flush=int))
    with pytest.raises(InputError) as error:
        parse(SMALL, words.split(), "prog")
    assert str(error.value) == said


def test_options_and_configuration_are_separated():
    options, config = parse(SMALL, ["--kind", "b", "--data", "x", "--on-bad-image", "placeholder"], "prog")
    assert config == Config(Net(1), "b") and str(options.data) == "x" and options.on_bad_image == "placeholder"
    assert parse(SMALL, ["--unknown", "1", "--workers", "2"], "prog", strict=False)[0] == Options(workers=2)


def with_tool(called, end=lambda: 0):
    """A solution with a tool that notes its arguments, and the loader of its verbs."""

    def measure(files: tuple[Path, ...], /, *, out: Path, side: int = 3, exact: bool = False):
        """Measure files.

        Args:
            out: Where the figures go.
        """
        called.append((files, out, side, exact))
        return end()

    module = SimpleNamespace(**vars(MODULE), TOOLS={"measure": "measure files"})
    return lambda line: cli.main("toy", module, dict, line.split(), lambda tool: {"measure": measure})


def test_a_tool_needs_no_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = []
    command = with_tool(called)
    assert command("measure a b --out c --exact") == 0 and command("measure --out c --side 5") == 0
    assert called == [((Path("a"), Path("b")), Path("c"), 3, True), ((), Path("c"), 5, False)]
    assert list(tmp_path.iterdir()) == []
    assert command("--help") == 0 and re.search(r"  measure +measure files\n", capsys.readouterr().out)
    with pytest.raises(SystemExit) as end:
        command("measure --help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "Measure files." in said and "Where the figures go." in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("measure --out c") == 2
    assert capsys.readouterr().err == "error: measure runs in one process: leave out torchrun\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("measure a", "Missing from cxr toy measure: --out PATH"),
        ("measure a --out", "Missing value for argument '--out'. Expected 1 values."),
        ("measure a --out c --side x", "--side: invalid literal for int() with base 10: 'x'"),
        ("measure a --out c --sid 4", "Unrecognized options: --sid, 4"),
        ("measured a", "'measured' is not a verb of toy: run,"),
    ],
)
def test_a_tool_refuses_in_one_line(words, said, capsys):
    called = []
    assert with_tool(called)(words) == 2 and not called
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_options_that_do_not_apply_are_refused(command, capsys):
    for words in ("--sizes a.csv", "--id-map a.csv", "--on-unlabelled skip"):
        done = command(f"prepare small --out r {words}")
        assert done.status == 2 and done.names == []
        assert capsys.readouterr().err == f"error: {words.split()[0]} does not apply to toy\n"
    done = command("tune small --out r --data d --hours 3")  # as in other verbs, though its help leaves --data out
    assert done.status == 0 and done.contexts[0].options.data == Path("d")


def test_exit_status_of_partial_success(command, capsys, tmp_path):
    assert with_tool([], lambda: 3)("measure --out c") == cli.PARTIAL == 4
    said = "done, but 3 of the inputs could not be used; they are named above"
    assert capsys.readouterr().err == said + "\n"
    assert with_tool([], lambda: raising(InputError("b.png: cut short"))(None))("measure --out c") == 2
    assert capsys.readouterr().err == "error: b.png: cut short\n"
    assert with_tool([], lambda: raising(KeyboardInterrupt())(None))("measure --out c") == 3
    assert capsys.readouterr().err == "interrupted\n"  # a tool does not continue

    def leaves_out(context):
        context.left_out += 2

    done = command("run small --out r", prepare=leaves_out, submit=leaves_out)
    assert done.status == 4 and done.names == list(cli.VERBS)
    assert "done, but 4 of the inputs" in (tmp_path / "r" / "log.txt").read_text()


def raising(error):
    def verb(_):
        raise error

    return verb


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("a.csv, row 2: wrong"), 2, "error: a.csv, row 2: wrong\n"),
        (OSError(28, "No space left on device", "a.npy"), 2, "error: a.npy: No space left on device\n"),
        (
            FileExistsError(17, "File exists", "out"),
            2,
            "error: out: is a file or a link that leads nowhere, not a folder\n",
        ),
        (RuntimeError("Symlink loop from 'x'"), 2, "error: Symlink loop from 'x': a link that leads to itself"),
        (InputError("x" * 2000 + "y" * 9999 + "z" * 2000), 2, f"error: {'x' * 1993} … {'z' * 2000}\n"),
        (PermissionError(13, "Permission denied", "data"), 2, "error: data: Permission denied\n"),
        (torch.OutOfMemoryError("CUDA"), 2, "error: out of GPU memory: lower the batch size"),
        (Stopped("the 2 hours are over"), 3, ""),
        (KeyboardInterrupt(), 3, "interrupted; the same command continues"),
    ],
)
def test_exit_statuses(error, status, said, command, capsys, tmp_path):
    done = command("run small --out r", predict=raising(error))
    assert done.status == status and done.names == ["prepare", "train", "predict"]
    out, err = capsys.readouterr()
    assert err.startswith(said) and err.count("\n") == bool(said)
    if status == 3 and not said:
        assert "stopped: the 2 hours are over. Everything is saved" in out
    if status == 2:
        assert said[7:].strip() in (tmp_path / "r" / "log.txt").read_text()
    assert command("run small --out r").status == 0  # the lock is free again


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), FileNotFoundError(2, "No such file", "x")])
def test_bugs_keep_their_traceback(error, command, tmp_path):
    with pytest.raises(type(error)):
        command("run small --out r", tune=raising(error))
    assert "Traceback" in (tmp_path / "r" / "log.txt").read_text()


def test_signals_wait_only_for_trainings(command, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def interrupted(context):
        context.budget.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert context.budget.spent()  # noted: the training saves, then stops
        raise Stopped(context.budget.reason)

    assert command("run small --out r", train=interrupted).status == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    def at_once(_):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    assert command("run small --out r", predict=at_once).status == 3
    capsys.readouterr()
    assert command("extra small --out r", extra=at_once).status == command("find_lr small", find_lr=at_once).status == 3
    begins_anew = "interrupted\n"  # a range test has no saved state
    assert (
        capsys.readouterr().err == f"interrupted; the same command continues from the last saved state\n{begins_anew}"
    )
