"""The command line, the same for every solution: `python -m solutions <name> <verb> [preset] [options]`.

A solution may also have tools, verbs that need no run: `python -m solutions <name> <tool> [inputs] [options]`. Where a
tool has the name of a verb, what follows decides: the tool takes a table (.csv or .parquet), the verb a preset.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from common import kaggle
from common.config import from_dict
from common.errors import InputError
from common.paths import read_json
from common.runs import Run, start_log
from common.train import distributed
from common.train.loop import Budget, Stopped

log = logging.getLogger(__name__)
VERBS = ("prepare", "train", "predict", "tune", "score", "submit", "report")  # what `run` does, in this order
STOPPED = 3  # exit status: saved and stopped on purpose, the same command continues
PARTIAL = 4  # exit status: done, but some inputs could not be used
USERS_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR)


@dataclass(frozen=True)
class Options:
    """What a user says about this machine and this occasion; nothing here changes what is computed from what."""

    data: Path | None = None
    """Folder of the competition as Kaggle unpacks it; on Kaggle found by itself."""
    out: Path | None = None
    """Folder of the run (default: runs/<solution>-<preset>)."""
    store: Path | None = None
    """Folder for the decoded images (default: stores/ beside the run; runs on the same data share it)."""
    hours: float | None = None
    """Stop after this time with everything saved; the same command continues."""
    test: Path | None = None
    """Images to predict instead of the competition's: a folder, or a CSV whose first column names them."""
    id_map: Path | None = None
    """CSV of image id and patient, so that folds share no patient."""
    fold_table: Path | None = None
    """CSV `image_id,fold` of another run whose folds are to be used."""
    sizes: tuple[Path, ...] = ()
    """CSV files with width and height of the originals, where images are resized copies (VinBigData)."""
    normals: tuple[Path, ...] = ()
    """Further folders of images without COVID-19, such as ChestX-ray14's or CheXpert's (COVID-19)."""
    on_bad_image: Literal["error", "placeholder"] = "error"
    """placeholder: a test image that cannot be read gets the neutral prediction."""
    on_unlabelled: Literal["error", "skip"] = "error"
    """skip: image files that no table names are left out (the real SIIM download has some)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    workers: int | None = None
    """Processes that read and augment (default: one a core)."""

    def __post_init__(self):
        if self.workers is not None and self.workers < 0:
            raise InputError(f"--workers must not be negative: {self.workers}")
        if self.hours is not None and not self.hours > 0:
            raise InputError(f"--hours must be above 0, not {self.hours:g}")
        check_device(self.device)


def check_device(name):
    """Raise InputError unless `name`, the value of --device, is auto, cpu, cuda or cuda:<n> and is here."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name!r}: choose auto, cpu, cuda or cuda:<n>")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs on this machine")


@dataclass
class Context:
    """What every verb of a solution gets."""

    solution: str
    preset: str
    config: Any
    options: Options
    run: Run
    device: torch.device
    budget: Budget = field(repr=False)
    submissions: Path = Path("submissions")
    left_out: int = 0
    """Inputs that could not be used and were named; a verb that goes on without them adds their number."""

    @property
    def workers(self):
        """Worker processes of a loader: on a CPU none, because the cores are busy with the network itself."""
        if self.options.workers is not None:
            return self.options.workers
        return len(os.sched_getaffinity(0)) // distributed.world() if self.device.type == "cuda" else 0


def main(solution, config_module, load_verbs, argv, load_tools=dict):
    """Run one verb or tool of a solution and return the exit status.

    `config_module` has `Config`, `PRESETS`, `MORE_VERBS` (names beside VERBS) and, if there are any, `TOOLS` (names of
    verbs that need no run), KAGGLE (a common.kaggle.Source, which brings tools of its own) and TAKES_SIZES or
    TAKES_NORMALS, True where that option is of use. `load_verbs()` and
    `load_tools()` give dicts from a name to a function, and are called late, because they import the networks. A verb's
    function takes the Context. A tool's own parameters and docstring are its command line (types and an `Args:` part; a
    parameter before `/` is positional); it returns how many inputs it could not use. Status 0: done; 2: the input
    cannot be used, said in one line; 3: stopped on purpose, saved; 4: done, but some inputs could not be used, which
    are named.
    """
    if _is_tool(config_module, argv):
        return run_tool(f"python -m solutions {solution} {argv[0]}", lambda: load_tools()[argv[0]], argv[1:])
    hint = "; the same command continues from the last saved state"
    return _guarded(lambda: _verb(solution, config_module, load_verbs, argv), hint)


def run_tool(program, load, argv):
    """Run the function that `load()` gives as a tool, see `main`, with `argv` behind the words `program`."""
    return _guarded(lambda: _tool(program, load, argv), "")


def _guarded(work, hint):
    start_log()
    try:
        left_out = work()
        if left_out:
            _say(f"done, but {left_out} of the inputs could not be used; they are named above")
        return PARTIAL if left_out else 0
    except InputError as error:
        return _refuse(error)
    except Stopped as stop:
        log.info(f"stopped: {stop}. Everything is saved; the same command continues.")
        return STOPPED
    except torch.OutOfMemoryError:
        return _refuse("out of GPU memory: lower the batch size (and raise accumulate to make up for it)")
    except OSError as error:
        if error.errno not in USERS_ERRORS:
            log.exception("a defect of the program")
            raise
        return _refuse(f"{error.filename or 'disk'}: {error.strerror}")
    except Exception:
        log.exception("a defect of the program")
        raise
    except KeyboardInterrupt:
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        start_log()  # lets go of log.txt
        distributed.stop()


def _refuse(reason):
    _say(f"error: {reason}")
    return 2


def _say(line):
    print(line, file=sys.stderr)
    log.error(line.removeprefix("error: "))  # to log.txt alone


def _tools(config_module):
    own = getattr(config_module, "TOOLS", ())
    return (*own, *kaggle.offered(getattr(config_module, "KAGGLE", None), own))


def _is_tool(config_module, argv):
    if not argv or argv[0] not in _tools(config_module):
        return False
    return argv[0] not in VERBS or re.search(r"\.(csv(\.gz)?|parquet)$", (*argv[1:], "")[0]) is not None


def _tool(program, load, argv):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{program.split()[-1]} runs in one process: leave out torchrun")
    tool = load()
    later = functools.wraps(tool)(lambda *args, **options: functools.partial(tool, *args, **options))
    return _read(later, program, argv)()


def _verb(solution, config_module, load_verbs, argv):
    known, tools = ["run", *VERBS, *config_module.MORE_VERBS], _tools(config_module)
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: python -m solutions {solution} <verb> [preset] [options]\n"
            f"verbs: {', '.join(known)}\npresets: {', '.join(config_module.PRESETS)}\n"
            f"all options: python -m solutions {solution} run <preset> --help"
        )
        if tools:
            print(f"without a run: {', '.join(tools)}; options: python -m solutions {solution} {tools[0]} --help")
        return 0
    verb, rest = argv[0], list(argv[1:])
    if verb not in known:
        raise InputError(f"{verb!r} is not a verb of {solution}: {', '.join([*known, *tools])}")
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if preset is not None and preset not in config_module.PRESETS:
        raise InputError(f"{preset!r} is not a preset of {solution}: {', '.join(config_module.PRESETS)}")
    preset, base = _base_config(solution, config_module, preset, rest)
    options, config = parse(base, rest, f"python -m solutions {solution} {verb} {preset}")
    for name in ("sizes", "normals"):
        if getattr(options, name) and not getattr(config_module, f"TAKES_{name.upper()}", False):
            raise InputError(f"--{name}: {solution} has no use for them")
    if verb in config_module.MORE_VERBS and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{verb} runs in one process: leave out torchrun")
    device = distributed.start(options.device)
    run = Run(options.out or Path("runs") / f"{solution}-{preset}")
    plain = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        start_log(run.path("log.txt") if distributed.is_main() else None)
        context = Context(solution, preset, config, options, run, device, Budget(options.hours))
        verbs = load_verbs()
        for name in VERBS if verb == "run" else (verb,):
            if name == "train" or distributed.is_main():
                verbs[name](context)
            distributed.barrier()
            if name == "train" and not distributed.is_main():
                return 0  # what comes after training is the first process's work
            if name == "train":
                distributed.stop()
        return context.left_out
    finally:
        _handle(plain)
        run.close()


def _handle(handlers):
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Nothing:
    """A configuration without fields, to read the other options before it is known which configuration is meant."""


def _base_config(solution, config_module, preset, rest):
    """The preset's configuration; without a preset, that of the run folder."""
    if preset is not None:
        return preset, config_module.PRESETS[preset]
    probe, _ = parse(_Nothing(), rest, f"python -m solutions {solution}", strict=False)
    stored = None if probe.out is None else probe.out / "config.json"
    if stored is None or not stored.is_file():
        raise InputError(f"name a preset ({', '.join(config_module.PRESETS)}), or --out with the folder of a run")
    values = read_json(stored)
    if not isinstance(values, dict):
        raise InputError(f"{stored}: not the configuration of a run")
    if values.pop("solution", None) != solution:
        raise InputError(f"{stored}: the run of another solution")
    return values.pop("preset", "stored"), from_dict(config_module.Config, values, str(stored))


def parse(base, argv, program, strict=True):
    """Read Options and changes of the configuration `base` from `argv`; returns (Options, configuration).

    Raises InputError with the parser's reason in one line.
    """
    both = dataclasses.make_dataclass("Command", [], bases=(type(base), Options), frozen=True)
    default = both(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    got = _read(tyro.conf.FlagConversionOff[both], program, argv, default=default, return_unknown_args=not strict)
    got = got if strict else got[0]

    def part(cls):
        return cls(**{f.name: getattr(got, f.name) for f in dataclasses.fields(cls)})

    return part(Options), part(type(base))


def _read(command, program, argv, **options):
    """What the parser makes of `argv` for a dataclass or function; InputError with its reason in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, prog=program, args=argv, config=(tyro.conf.FlagCreatePairsOff,), **options)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise InputError(_one_line(said.getvalue()).removeprefix("Error parsing Command: ")) from None


def _one_line(box):
    """The reason inside the parser's box: what stands between its title and its first rule.

    The box is drawn with lines, or, where the terminal's encoding lacks them, with hyphens and no frame.
    """
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    lines = [line for line in lines if line]
    rules = [number for number, line in enumerate(lines) if line.lstrip("─-") == "" or line.startswith("─ ")]
    if len(rules) < 2:
        return " ".join(lines)
    reason = " ".join(lines[rules[0] + 1 : rules[1]])
    hint = next((line.split()[0] for line in lines[rules[1] :] if line.startswith("--") and line.strip("-")), None)
    return f"{reason} (did you mean {hint}?)" if hint and "Unrecognized" in reason else reason
