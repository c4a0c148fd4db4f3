"""The command `cxr` (or `python -m solutions`): the verbs and tools of each solution, and commands for all of them."""

import os
import select
import sys

if sys.platform == "win32":
    print("error: cxr needs Linux or macOS; on Windows, install and run it inside WSL", file=sys.stderr)
    sys.exit(2)
# set before the imports that read them
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations would query the registry at import
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make torch crawl where cores are shared
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "15")  # fewer progress lines in a log file

import importlib

from common import cli, kaggle
from common.errors import STOPPED, check

NAMES = ("siim_pneumothorax", "lung_segmentation", "vinbigdata", "rsna_pneumonia", "chestxray14", "covid19", "own")
COMMANDS = {  # for all solutions: a line of help, and a function that loads the tool
    "bundle": (
        "pack everything that a Kaggle notebook needs into one folder",
        lambda: _load("common.kaggle.bundle", "bundle_tool")(export_run),
    ),
    "log": ("list uploaded submissions and their scores", lambda: _load("common.kaggle.log_page", "log_tool")),
    "new": ("copy a solution as the skeleton of a new one", lambda: _load("solutions.new", "new")),
    "push": ("upload an exported folder to the Hugging Face hub", lambda: _load("common.hub", "push_tool")(_card_of)),
    "pull": ("download an exported folder from there", lambda: _load("common.hub", "pull")),
}
LINES = {"<name> --help": "list its verbs, presets and tools", "demo": "run every solution on its embedded sample"}
LINES |= {k: line for k, (line, _) in COMMANDS.items()}
USAGE = "\n       ".join(
    ["usage: cxr <name> <verb> [preset] [options]", *(f"cxr {name:16} {line}" for name, line in LINES.items())]
)
USAGE += f"\nsolutions: {', '.join(NAMES)}"
DEMO = "usage: cxr demo [folder]\nfolder: for all files (default: runs/demo); repeating the command continues"


def main(argv=None):
    """Run a command line (default: this process's) and return the exit status; a closed pipe ends it quietly.

    Characters that the terminal's encoding lacks are printed as escape sequences.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams lack it
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _dispatch((sys.argv[1:] if argv is None else argv) or ["--help"])
        finally:
            sys.stdout.flush()  # now, since at exit Python would report the closed pipe
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)  # no events: poll then reports only errors and hang-ups
        if not output.poll(0):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED


def _dispatch(argv):
    name, *rest = argv
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "demo" and (len(rest) > 1 or (rest[:1] and rest[0].startswith("-"))):
        asked = rest[0] in ("-h", "--help")
        print(DEMO, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if name == "demo":
        from solutions.demo import run_all

        ended = []
        status = cli.report_errors(lambda: ended.append(run_all(NAMES, rest, export_run)), "; repeat the command")
        return status or ended[0]
    if name in COMMANDS:
        return cli.run_tool(name, COMMANDS[name][1], rest)
    if name not in NAMES:
        print(f"error: {name!r} is not a solution: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    config = importlib.import_module(f"solutions.{name}.config")
    return cli.main(
        name, config, lambda: load_solution(name).verbs(), rest, lambda tool: _load_tools(name, config, tool, rest)
    )


def load_solution(name):
    """Return the Solution of this name."""
    return _load(f"solutions.{name}.pipeline", "SOLUTION")


def _load_tools(name, config, tool, argv=()):
    """Return the tools that include `tool`; those for Kaggle do not need the solution's own imports."""
    if tool in kaggle.tool_names(config.KAGGLE):
        return kaggle.load_tools(name, config.KAGGLE, config.PRESETS)
    if tool not in cli.TOOLS:
        return _load(f"solutions.{name}.tools", "TOOLS")
    from common.compare import comparison_tools
    from common.export import export_tool, infer_tool

    recipe, takes_sizes = load_solution(name), "sizes" in getattr(config, "TAKES", ())
    if tool in ("table", "score_predictions"):
        return comparison_tools(recipe, config.Config)
    if tool == "refit":
        return {tool: _load("common.refit", "refit_tool")(recipe, config.Config)}
    if tool == "blend":
        read = recipe.comparison.read_predictions
        return {tool: _load("common.blend", "blend_tool")(recipe, config.Config, read)}
    hide_sizes = not takes_sizes and bool({"-h", "--help"} & set(argv))  # the parser rejects hidden options
    infer = infer_tool(recipe, config.Config, takes_sizes, hide_sizes)
    return {"export": export_tool(recipe, config.Config), "infer": infer}


def export_run(name, run, out):
    """Write the weights and the decision rule of a finished run to the folder `out`."""
    check(name in NAMES, f"{run}: a run of {name}, which is not a solution: {', '.join(NAMES)}")
    _load_tools(name, importlib.import_module(f"solutions.{name}.config"), "export")["export"](run, out=out)


def _card_of(name):
    check(name in NAMES, f"exported from a run of {name}, which is not a solution: {', '.join(NAMES)}")
    return _load(f"solutions.{name}.config", "CARD")


def _load(module, attribute):
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
