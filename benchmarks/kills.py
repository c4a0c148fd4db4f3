"""A whole run killed with SIGKILL again and again ends with the bytes of an undisturbed one.

    OMP_NUM_THREADS=1 python -m benchmarks.kills [--solution siim_pneumothorax] [--kills 20] [--tool-kills 5] [--seed 0]

Every verb is hit, the training most often, at random moments; after each kill the same command starts again. So are
the tools export, infer, bundle and masks, each beside files of the user's own. The whole process group is killed. The
command runs in a forked child of a process that has everything imported, which spares the seconds of the import. All
files are compared but those that hold times, and the report. Exit status 0: the same bytes everywhere; 1: another
outcome.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from common.cli import VERBS
from common.kaggle import bundle
from common.recipe import Solution
from solutions.__main__ import main as solutions_main
from tests.running import VARYING, hash_files
from tests.solutions.contract import SOLUTIONS, make_sample

# words that make a solution's training longer, with more variants of its weights
WINDOW = "--segmenter.window 2 --segmenter.averaging window classic best best_k ema"
LONGER = {"siim_pneumothorax": f"--segmenter.epochs 4 {WINDOW}"}
# the verbs that a round of kills hits, so many of them as are wanted, in this order of importance
TARGETS = ("train", "predict", "prepare", "train", "submit", "tune", "train", "score", "train", "report")
# found in every folder in which a tool works, some with names like those of temporary files
FOREIGN = ("out/thesis.docx", "out/.notes.tmp.csv", "out/.bundle.tmp", "out/masks/own.txt", "out/.cxr-own/a.tmp.csv")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solution", nargs="+", choices=SOLUTIONS, default=list(SOLUTIONS), metavar="NAME")
    parser.add_argument("--kills", type=int, default=20, help="of each solution")
    parser.add_argument("--tool-kills", type=int, default=5, help="of each tool")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.solution:
        SOLUTIONS[name].recipe  # noqa: B018 - imported before the first child is forked
    status = 0
    for name in options.solution:
        print(f"{name}:")
        with tempfile.TemporaryDirectory() as root:
            rng = np.random.default_rng(options.seed)
            status |= campaign(SOLUTIONS[name], Path(root), options.kills, rng)
            for tool, argv in tools_of(SOLUTIONS[name], Path(root)).items() if options.tool_kills else ():
                status |= tool_campaign(tool, argv, Path(root), options.tool_kills, rng)
    sys.exit(status)


def campaign(case, root, kills, rng):
    """Kill `kills` times, in rounds that start from an empty folder; returns the exit status."""
    in_child(lambda: make_sample(case, root / "data"), root / "sample.txt")
    begun = time.monotonic()
    argv = [case.name, "run", *case.words, *LONGER.get(case.name, "").split(), "--data", root / "data", "--out", "run"]
    steps = attempt(argv, root / "undisturbed")
    wanted, spans = fingerprint(root / "undisturbed"), dict(zip(steps, np.diff([*steps.values()]), strict=False))
    print(f"undisturbed: {time.monotonic() - begun:.1f} s, {len(wanted)} files to compare", flush=True)
    same, left, number = True, kills, 0
    while left:
        targets = sorted(TARGETS[: min(left, len(TARGETS))], key=[*VERBS].index)
        for verb in targets:
            moment = rng.random() * spans[verb] / targets.count(verb)
            found = attempt(argv, root / f"round{number}", (verb, moment))
            where = "nothing: it had ended" if "end" in found else [*found][-1]
            print(f"  round {number}: {moment:5.2f} s into {verb:8} killed in {where}{_detail(root, number, where)}")
        left, number = left - len(targets), number + 1
        attempt(argv, root / f"round{number - 1}")
        found = fingerprint(root / f"round{number - 1}")
        differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        print(f"round {number - 1}: {'differs in ' + ', '.join(differ) if differ else 'the same bytes'}", flush=True)
        same &= not differ
    return 0 if same and wanted else 1


def tools_of(case, root):
    """Return the command lines of the tools that apply to a solution, in an order in which each finds its input."""
    run, trained = root / "undisturbed" / "run", root / "export" / "undisturbed" / "out" / "trained"
    tools = {"export": [case.name, "export", run, "--out", "out/trained"]}
    answer = ["--out", "out/answer.csv", "--work", "out/work", "--workers", "0"]
    tools["infer"] = [case.name, "infer", trained, "--data", root / "data", *answer]
    tools["bundle"] = ["bundle", run, "--out", "out/bundle"]
    if case.name == "lung_segmentation":
        tools["masks"] = [case.name, "masks", root / "data" / "ChinaSet_AllFiles", "--out", "out/masks"]
    return tools


def tool_campaign(tool, argv, root, kills, rng):
    """Kill a tool `kills` times, starting it again after each one; returns the exit status."""
    folders = [root / tool / name for name in ("undisturbed", "killed")]
    for folder in folders:
        for name in FOREIGN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    times, ended = attempt(argv, folders[0]), 0
    for _ in range(kills):
        ended += "end" in attempt(argv, folders[1], ("start", rng.random() * (times["end"] - times["start"])))
    attempt(argv, folders[1])
    wanted, found = (hash_files(folder / "out", but=VARYING) for folder in folders)
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    said = f"differs in {', '.join(differ)}" if differ else f"the same {len(wanted)} files"
    print(f"  {tool}: {times['end'] - times['start']:.1f} s, {kills} kills, {ended} after its end: {said}", flush=True)
    return bool(differ)


def attempt(argv, folder, kill=None):
    """Run the command in a folder, to its end or to the kill (verb or "start", seconds into it).

    Returns {verb: time at which it began}, with `start` and `end`.
    """
    folder.mkdir(exist_ok=True)
    notes = folder / "steps.txt"
    notes.write_text("")
    process = fork(lambda: run_noted(argv, folder, notes), folder / "output.txt")
    deadline = None
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if kill and deadline is None and f"{kill[0]} " in notes.read_text():
            deadline = time.monotonic() + kill[1]
        if deadline is not None and time.monotonic() >= deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            break
        time.sleep(0.002)
    else:
        if ended[1]:
            raise SystemExit(f"{argv}: the run failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    return {verb: float(when) for verb, when in map(str.split, notes.read_text().splitlines())}


def run_noted(argv, folder, notes):
    """Run the command, writing the moment at which each verb begins to the file `notes`."""
    os.chdir(folder)

    def note(name):
        with open(notes, "a") as file:
            file.write(f"{name} {time.monotonic()}\n")

    def noted(name, verb):
        def run(job):
            note(name)
            verb(job)

        return run

    of_recipe = Solution.verbs
    Solution.verbs = lambda recipe: {name: noted(name, verb) for name, verb in of_recipe(recipe).items()}
    bundle.fetch_wheels = lambda *_: []  # needs the network
    note("start")
    status = solutions_main([str(word) for word in argv])
    note("end")
    return status


def fork(work, output):
    """Start `work` in a child with its own process group and its output in a file; returns the child's id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = work() or 0
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status if isinstance(status, int) else 0)


def in_child(work, output):
    """Run `work` in a child to its end: threads started here would be missing in the children after it."""
    if os.waitpid(fork(work, output), 0)[1]:
        raise SystemExit(output.read_text())


def fingerprint(folder):
    """Return the SHA-256 of every file that must be the same, by its path in the run."""
    return hash_files(folder / "run", but=VARYING)


def _detail(root, number, where):
    """What of the training was finished."""
    if where != "train":
        return ""
    run = root / f"round{number}" / "run"
    done = [path.parent.relative_to(run) for path in sorted(run.glob("fold*/*/final.safetensors"))]
    begun = [path.relative_to(run) for path in sorted(run.glob("fold*/*")) if path.relative_to(run) not in done]
    epochs = [len(list((run / path).glob("epoch*"))) for path in begun[:1]]
    return f", {len(done)} trainings done" + (f", {begun[0]} with {epochs[0]} epochs" if begun else "")


if __name__ == "__main__":
    main()
