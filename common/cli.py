"""The command line, the same for every solution: `cxr <name> <verb> [preset] [options]`.

A solution may also have tools, which need no run: `cxr <name> <tool> [inputs] [options]`. Torch is imported only after
the command line has been parsed, so that --help answers at once.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import tyro

from common import kaggle, processes
from common.budget import Budget, Stopped
from common.config import from_dict, read_settings, update
from common.errors import PARTIAL, STOPPED, InputError, check, log
from common.options import FLAGS, MEMORY, Options, check_special, hidden_options
from common.runs import FINISHED, Run, coloured, start_log

VERBS = {  # `run` calls these in this order
    "prepare": "read and check the challenge's files, assign the folds, decode the images",
    "train": "train every network of the run",
    "predict": "predict each fold's held-out images and the test images",
    "tune": "choose the decision rule on out-of-fold predictions",
    "score": "print the cross-validated score with its interval",
    "submit": "write the submission and validate it",
    "report": "write the report page of the run",
}
NO_PRESETS = ("stored", "blend", "refit")  # what config.json names instead for runs without a preset of their own
SHARED = ("prepare", "train", "predict", "audit", "infer", "masks", "crops")  # run by all processes under torchrun
MORE_VERBS = {  # further verbs of every solution
    "find_lr": "run learning-rate range tests",
    "plan": "estimate the hours, memory and disk of a run from some steps on a few images",
}
TOOLS = {  # tools of every solution, which need no run
    "export": "copy a finished run's weights and decision rule into one flat folder",
    "infer": "predict images from such a folder and write a submission",
    "blend": "mix the predictions of several runs into one run, with weights searched out of fold",
    "refit": "train on the images of all folds for the epochs that a run chose, and submit with its rule",
    "table": "compare runs side by side, paired by patient",
    "score_predictions": "score anyone's predictions against labels, with intervals",
}
ABOUT = {  # help of presets that solutions share, unless a configuration overrides it
    "demo": "small networks on small images: minutes on two CPU cores",
    "paper": "the publication's recipe",
    "podium": "the strongest recipe we know",
    "kaggle": "podium with batches for two T4 (see `plan --kaggle`)",
}
LONGEST_LINE = 4000  # characters of an error, which may quote a cell of a table
USER_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR)
USER_ERRORS += (errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EIO, errno.ESTALE)


def main(solution, config_module, load_verbs, argv, load_tools=lambda tool: {}):
    """Run one verb or tool of a solution and return the exit status.

    config_module: has `Config`, `PRESETS` and optionally `ABOUT`, `MORE_VERBS` and `TOOLS` (one line of help for each
        preset, further verb and tool, by name), `KAGGLE` (a common.kaggle.Source, which adds tools) and `TAKES` (the
        options of options.SPECIAL that apply).
    load_verbs(), load_tools(tool): return {verb: function of a Job} and {tool: function}. They are called late, since
        they import networks. A tool's signature and docstring define its command line; it returns the number of inputs
        that it left out.
    Exit status: 0 done; 2 unusable input; 3 stopped on purpose, all saved; 4 done, but some inputs could not be used.
    """
    if argv and argv[0] in _tool_names(config_module):
        return run_tool(f"{solution} {argv[0]}", lambda: load_tools(argv[0])[argv[0]], argv[1:])
    hint = "" if argv[:1] in (["find_lr"], ["plan"]) else "; the same command continues from the last saved state"
    return report_errors(lambda: _run_verb(solution, config_module, load_verbs, argv, load_tools), hint)


def run_tool(name, load, argv):
    """Run the function that `load()` returns as the tool `cxr <name>` and return the exit status, see `main`."""

    def work():
        _require_one_process(name.split()[-1])
        tool = load()
        # the parser only binds the arguments: errors of a tool run inside it would be taken for parsing errors
        deferred = functools.wraps(tool)(lambda *args, **options: functools.partial(tool, *args, **options))
        return _parse(deferred, f"cxr {name}", argv)()

    return report_errors(work, "")


def report_errors(work, hint):
    """Call `work()`, print its error, if any, in one line, and return the exit status."""
    start_log()
    before = _on_signals({signal.SIGTERM: signal.default_int_handler, signal.SIGINT: signal.getsignal(signal.SIGINT)})
    try:
        left_out = work()
        if left_out:
            _print_error(f"done, but {left_out} of the inputs could not be used; they are named above")
        return PARTIAL if left_out else 0
    except InputError as error:
        return _refuse(error)
    except Stopped as stop:
        log.info(f"stopped: {stop}. Everything is saved; the same command continues.")
        return STOPPED
    except KeyboardInterrupt:
        print(f"interrupted{hint}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        raise  # the reader of the output is gone; the caller decides
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USER_ERRORS:
            is_taken = error.errno == errno.EEXIST  # mkdir's
            reason = "is a file or a link that leads nowhere, not a folder" if is_taken else error.strerror
            return _refuse(f"{error.filename or 'disk'}: {reason}")
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Path.resolve's
            return _refuse(f"{error}: a link that leads to itself; replace it with the file")
        if type(error).__name__ == "OutOfMemoryError":  # the class of torch, which is not imported here
            return _refuse("out of GPU memory: lower the batch size (and accumulate), or try --micro-batch auto")
        if processes.count() > 1 and "gloo" in str(error):  # lost connection to a process that has ended
            return _refuse("another process has ended; torchrun names it") if processes.is_main() else STOPPED
        log.exception("unexpected error")
        raise
    finally:
        processes.leave()
        _on_signals(before)
        start_log()  # closes log.txt


def _on_signals(handlers):
    """Install signal handlers and return the ones replaced; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def _refuse(reason):
    _print_error(f"error: {reason}")
    return 2


def _print_error(line):
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", line)  # names may contain line ends and escape sequences
    line = line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
    print(coloured(line, "red", sys.stderr), file=sys.stderr)
    log.error(line.removeprefix("error: "))  # the console handler skips errors, so this reaches log.txt only


def _tool_names(config_module):
    return getattr(config_module, "TOOLS", {}) | TOOLS | kaggle.tool_names(getattr(config_module, "KAGGLE", None))


def _require_one_process(name):
    check(processes.count() == 1 or name in SHARED, f"{name} runs in one process: leave out torchrun")


def _run_verb(solution, config_module, load_verbs, argv, load_tools):
    """Run a verb and return the number of inputs that it left out."""
    more, tools = getattr(config_module, "MORE_VERBS", {}) | MORE_VERBS, _tool_names(config_module)
    known = {"run": f"{', '.join(VERBS)}, in this order"} | VERBS | more
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(solution, config_module, known, tools))
        return 0
    verb, rest = argv[0], [part for word in argv[1:] for part in ([word, "True"] if word in FLAGS else [word])]
    check(verb in known, f"{verb!r} is not a verb of {solution}: {', '.join([*known, *tools])}")
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if preset is not None and preset not in config_module.PRESETS:
        raise InputError(f"{preset!r} is not a preset of {solution}: {', '.join(config_module.PRESETS)}")
    on_all, rest = _take_all_folds(rest)
    takes, line = getattr(config_module, "TAKES", ()), f"{known[verb][0].upper()}{known[verb][1:]}."
    shown = {"description": line, "hidden": hidden_options(verb, takes)}
    preset, base = _base_config(solution, config_module, verb, preset, rest, shown)
    options, config = parse(base, rest, f"cxr {solution} {verb} {preset}", **shown)
    check_special(options, verb, takes, solution)
    options = dataclasses.replace(options, out=options.out or Path("runs") / f"{solution}-{preset}")
    if preset != "refit" and (n_folds := getattr(config, "n_folds", None)) in getattr(config, "folds", ()):
        raise InputError(f"folds {config.folds}: must be distinct and between 0 and {n_folds - 1}")
    if verb in more:
        _require_one_process(verb)
    call = functools.partial(_call_verbs, tuple(VERBS) if verb == "run" else (verb,), solution, preset)
    check(not on_all or (verb == "run" and not options.seeds), "--folds all belongs to `run`, without --seeds")
    if not options.seeds and not on_all:
        return call(config, options, load_verbs, tools)
    _require_one_process("run --folds all" if on_all else "run --seeds")
    out, begun = options.out, time.monotonic()

    def left():
        return options.hours and max(1e-3, options.hours - (time.monotonic() - begun) / 3600)

    if on_all:
        source = out.with_name(f"{out.name}-folds")
        left_out = call(config, dataclasses.replace(options, out=source), load_verbs, tools)
        machine = {name: getattr(options, name) for name in ("device", "workers", *MEMORY)}
        load_tools("refit")["refit"](source, out=out, hours=left(), **machine)
        return left_out
    left_out, folders = 0, []
    seeded = [dataclasses.replace(config, seed=seed) for seed in options.seeds]  # checked before the first run
    for each in seeded:
        one = dataclasses.replace(options, out=out.with_name(f"{out.name}-seed{each.seed}"), hours=left())
        if folders and options.fold_table is None:
            one = dataclasses.replace(one, fold_table=folders[0] / "folds.csv")
        left_out = max(left_out, call(each, one, load_verbs, tools))
        folders.append(one.out)
    load_tools("blend")["blend"](tuple(folders), out=out)
    return left_out


def _take_all_folds(words):
    """Return whether the command line asks for `--folds all`, and the words without it."""
    words = [part for word in words for part in (("--folds", "all") if word == "--folds=all" else (word,))]
    places = [at for at, pair in enumerate(itertools.pairwise(words)) if pair == ("--folds", "all")]
    return bool(places), words[: places[0]] + words[places[0] + 2 :] if places else words


def _call_verbs(names, solution, preset, config, options, load_verbs, tools):
    """Call these verbs in turn on one Job; under torchrun, all processes run the SHARED verbs, which come first."""
    from common.job import Job
    from common.train import distributed

    begun, device = time.monotonic(), distributed.start(options.device)
    with contextlib.closing(Run(options.out, may_join=names == ("train",))) as run:
        run.joined = processes.ask_main(lambda: run.joined)
        start_log(run.path("log.txt") if processes.is_main() else None)
        job = Job(solution, preset, config, options, run, device, Budget(options.hours))
        verbs = load_verbs()
        with job.budget.watching():
            for name in names:
                if name not in SHARED:
                    if not processes.is_main():
                        return 0
                    processes.leave()
                verbs[name](job)
                distributed.barrier()
        if len(names) > 1:
            took = timedelta(seconds=round(time.monotonic() - begun))
            log.info(f"done in {took}; next: cxr {solution} {_next_command(preset, run, tools)}", extra=FINISHED)
        return job.left_out


def _next_command(preset, run, tools):
    if preset == "demo":
        return "run podium --data FOLDER"
    answer = run.path("submission.csv")
    return f"upload {answer} -m TEXT" if "upload" in tools and answer.is_file() else f"export {run.folder} --out FOLDER"


@dataclass(frozen=True)
class _NoConfig:
    """An empty configuration, for parsing the other options before the configuration is known."""


def _overview(solution, config_module, verbs, tools):
    """Return the help of a solution: a line for each verb, preset and tool."""
    about = ABOUT | getattr(config_module, "ABOUT", {})
    presets = {name: about.get(name, "") for name in config_module.PRESETS}
    lines = [f"usage: cxr {solution} <verb> [preset] [options]", f"       cxr {solution} <tool> [inputs] [options]"]
    for title, named in (
        ("verbs", verbs),
        (f"presets (all settings: cxr {solution} run <preset> --help)", presets),
        (f"tools, which need no run (options: cxr {solution} <tool> --help)", tools),
    ):
        width = 2 + max(map(len, named), default=0)
        lines += [f"{title}:", *(f"  {name:{width}}{text}".rstrip() for name, text in named.items())]
    return "\n".join(lines)


def _base_config(solution, config_module, verb, preset, rest, shown):
    """Return the preset's name and its configuration, or those stored in the run, updated by the file --config."""
    known, presets = config_module.PRESETS, ", ".join(config_module.PRESETS)
    if preset is not None and not any(word.startswith("--config") for word in rest):
        return preset, known[preset]
    about = f"{shown['description']} With a preset ({presets}), --help lists its settings too."
    program, shown = f"cxr {solution} {verb} [preset]", shown | {"description": about}
    probe, _ = parse(_NoConfig(), rest, program, strict=False, **shown)
    given = {} if probe.config is None else _settings(solution, probe.config)
    named = given.pop("preset", None)
    preset = preset or named
    base = known.get(preset) if isinstance(preset, str) else None
    if preset is None:
        stored = None if probe.out is None else probe.out / "config.json"
        if stored is None or not stored.is_file():
            unknown = "" if probe.out is None else f"{probe.out}: not the folder of a run; "
            raise InputError(f"{unknown}name a preset ({presets}), or --out with the folder of a run")
        values = _settings(solution, stored)
        preset, base = values.pop("preset", "stored"), from_dict(config_module.Config, values, str(stored))
    elif base is None:  # the file is the configuration of a run without a preset of its own
        check(preset in NO_PRESETS, f"{probe.config}: {preset!r} is not a preset of {solution}: {presets}")
        base = from_dict(config_module.Config, given, str(probe.config))
    return preset, update(base, given, str(probe.config)) if given else base


def _settings(solution, path):
    """Return the settings in a file, which may also name a solution and a preset."""
    values = read_settings(path)
    check(values.pop("solution", solution) == solution, f"{path}: belongs to another solution")
    return values


def parse(base, argv, program, strict=True, description=None, hidden=()):
    """Read Options and changes to the configuration `base` from `argv`; return (Options, configuration).

    program, description: shown by --help above the options; hidden: names of Options that --help leaves out. strict:
    False ignores unknown options. Raises InputError with the parser's reason in one line.
    """
    hidden = hidden if {"-h", "--help"} & set(argv) else ()  # the parser rejects hidden options

    @dataclasses.dataclass(frozen=True)
    class Command(type(base), Options):  # not `type()`: tyro reads help from comments in the source
        __annotations__ = {f.name: tyro.conf.Suppress[f.type] for f in dataclasses.fields(Options) if f.name in hidden}

    default = Command(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    command, about = tyro.conf.FlagConversionOff[Command], {"default": default, "description": description}
    got = _parse(command, program, argv, **about, return_unknown_args=not strict)
    got = got if strict else got[0]

    def part(cls):
        return cls(**{f.name: getattr(got, f.name) for f in dataclasses.fields(cls)})

    return part(Options), part(type(base))


def _parse(command, program, argv, **options):
    """Parse `argv` by tyro for a dataclass or function. Raises InputError with the parser's reason in one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(command, prog=program, args=argv, config=(tyro.conf.FlagCreatePairsOff,), **options)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise InputError(re.sub(r"^Error parsing (Command: )?", "", _reason(printed.getvalue()))) from None


def _reason(box):
    """Return the reason inside tyro's error box: the text between its title and its first rule.

    The box is drawn with lines or, if the terminal's encoding lacks them, with hyphens and no frame.
    """
    lines = [line for line in (line.strip("│╭╮╰╯ ") for line in box.splitlines()) if line]
    rules = [number for number, line in enumerate(lines) if line.lstrip("─-") == "" or line.startswith("─ ")]
    if len(rules) < 2:
        return " ".join(lines)
    reason = " ".join(lines[rules[0] + 1 : rules[1]])
    hint = next((line.split()[0] for line in lines[rules[1] :] if line.startswith("--") and line.strip("-")), None)
    return f"{reason} (did you mean {hint}?)" if hint and "Unrecognized" in reason else reason
