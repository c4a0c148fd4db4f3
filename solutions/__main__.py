"""`python -m solutions <name> <verb> …` and `python -m solutions demo`."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the registry at import

import importlib
import sys

from common.errors import InputError

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "15")  # a bar in a log file, now and then

NAMES = ("siim_pneumothorax", "lung_segmentation", "vinbigdata", "chestxray14", "covid19")


def main(argv):
    """Hand the command to the solution that its first word names; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: python -m solutions <name> <verb> [preset] [options]\n"
            f"       python -m solutions <name> --help\n"
            f"       python -m solutions demo\n"
            f"       python -m solutions bundle   what a notebook on Kaggle needs, as one folder\n"
            f"       python -m solutions log      what was uploaded, and its scores\n"
            f"solutions: {', '.join(NAMES)}"
        )
        return 0
    if argv[0] == "demo":
        from solutions.demo import run_all

        return run_all(NAMES, argv[1:], export_run)
    if argv[0] == "bundle":
        from common.cli import run_tool
        from common.kaggle.bundle import bundle_tool

        return run_tool("python -m solutions bundle", lambda: bundle_tool(export_run), argv[1:])
    if argv[0] == "log":
        from common.cli import run_tool
        from common.kaggle.log import show

        return run_tool("python -m solutions log", lambda: show, argv[1:])
    if argv[0] not in NAMES:
        print(f"error: {argv[0]!r} is not a solution: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    from common.cli import main as run_verb

    config = importlib.import_module(f"solutions.{argv[0]}.config")
    # late, and tools without the networks that verbs need: importing these takes seconds
    return run_verb(
        argv[0], config, lambda: _load(argv[0], "pipeline.VERBS"), argv[1:], lambda: _tools(argv[0], config, argv[1])
    )


def _tools(name, config, wanted):
    """The tools for Kaggle, which every solution has, or the solution's own, whichever `wanted` is among."""
    from common import kaggle

    shared = kaggle.tools(name, config.KAGGLE, getattr(config, "TOOLS", ()), config.PRESETS)
    return shared if wanted in shared else _load(name, "tools.TOOLS")


def export_run(name, run, out):
    """Write what a finished run of this solution has learnt to the folder `out`."""
    own = getattr(importlib.import_module(f"solutions.{name}.config"), "TOOLS", ()) if name in NAMES else ()
    if "infer" not in own:
        raise InputError(f"{run}: runs of {name} cannot be bundled")
    _load(name, "tools.TOOLS")["export"](run, out=out)


def _load(name, kind):
    module, attribute = kind.split(".")
    return getattr(importlib.import_module(f"solutions.{name}.{module}"), attribute)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
