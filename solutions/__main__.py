"""`cxr <name> <verb> …` (or `python -m solutions …`) and the commands that concern all solutions."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would query the registry at import

import importlib
import sys

from common import kaggle
from common.errors import InputError

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "15")  # fewer progress lines in a log file

NAMES = ("siim_pneumothorax", "lung_segmentation", "vinbigdata", "chestxray14", "covid19")
USAGE = f"""\
usage: cxr <name> <verb> [preset] [options]
       cxr <name> --help
       cxr demo     every solution on its embedded sample
       cxr bundle   one folder with everything that a notebook on Kaggle needs
       cxr log      uploaded submissions and their scores
solutions: {", ".join(NAMES)}"""


def main(argv=None):
    """Run the command `argv` (default: that of this process) and return the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "demo":
        from solutions.demo import run_all

        return run_all(NAMES, rest, export_run)
    # late: even these take a tenth of a second or more, which the usage above can do without
    from common import cli

    if name == "bundle":
        return cli.run_tool(name, lambda: _load("common.kaggle.bundle", "bundle_tool")(export_run), rest)
    if name == "log":
        return cli.run_tool(name, lambda: _load("common.kaggle.log_page", "log_tool"), rest)
    if name not in NAMES:
        print(f"error: {name!r} is not a solution: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    config = importlib.import_module(f"solutions.{name}.config")

    def load_tools():  # a tool for Kaggle starts without the imports of the solution's own
        shared = kaggle.load_tools(name, config.KAGGLE, getattr(config, "TOOLS", ()), config.PRESETS)
        if rest[0] in ENGINE:
            return _engine_tools(name, config)
        return shared if rest[0] in shared else _load(f"solutions.{name}.tools", "TOOLS")

    return cli.main(name, config, lambda: load_verbs(name), rest, load_tools)


def load_verbs(name):
    pipeline = importlib.import_module(f"solutions.{name}.pipeline")
    return pipeline.SOLUTION.verbs() if hasattr(pipeline, "SOLUTION") else pipeline.VERBS


ENGINE = ("export", "infer")


def _engine_tools(name, config):
    pipeline = importlib.import_module(f"solutions.{name}.pipeline")
    if not hasattr(pipeline, "SOLUTION"):
        return _load(f"solutions.{name}.tools", "TOOLS")
    from common.export import export_tool, infer_tool

    return {
        "export": export_tool(pipeline.SOLUTION, config.Config),
        "infer": infer_tool(pipeline.SOLUTION, config.Config, getattr(config, "TAKES_SIZES", False)),
    }


def export_run(name, run, out):
    """Write the weights and the decision rule of a finished run to the folder `out`."""
    own = getattr(importlib.import_module(f"solutions.{name}.config"), "TOOLS", ()) if name in NAMES else ()
    if "infer" not in own:
        raise InputError(f"{run}: runs of {name} cannot be bundled")
    _engine_tools(name, importlib.import_module(f"solutions.{name}.config"))["export"](run, out=out)


def _load(module, attribute):
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
