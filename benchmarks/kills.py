"""A whole SIIM run killed with SIGKILL again and again ends with the bytes of an undisturbed one.

    OMP_NUM_THREADS=1 python -m benchmarks.kills [--kills 20] [--seed 0]

Every verb is hit, the training most often, at moments drawn at random; after each kill the same command starts anew.
Killed is the whole process group. The command runs in a forked child of a process that has everything imported, which
spares the seconds of the import. Compared are all final weights, the probabilities, the rule and the submission. Exit
status 0: the same bytes; 1: another outcome.
"""

import argparse
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common.cli import VERBS
from solutions.__main__ import main as solutions_main
from solutions.siim_pneumothorax import pipeline
from solutions.siim_pneumothorax.sample import make_sample

NET = "test_resnet.r160_in1k"  # timm's smallest, 0.5 million parameters
TINY = f"""--store-size 64
    --classifier.backbone {NET} --classifier.weights none --classifier.size 64 --classifier.batch-size 4
    --classifier.epochs 2 --classifier.precision fp32
    --segmenter.encoder {NET} --segmenter.weights none --segmenter.sizes 64 --segmenter.batch-size 4
    --segmenter.epochs 2 --segmenter.precision fp32""".split()
LONGER = ["--segmenter.epochs", "4", "--segmenter.window", "2", "--segmenter.averaging"]
LONGER += ["window", "classic", "best", "best_k", "ema"]
# the verbs that a round of kills hits, so many of them as are wanted, in this order of importance
TARGETS = ("train", "predict", "prepare", "train", "submit", "tune", "train", "score", "train", "report")
COMPARED = ("fold*/*/final.safetensors", "oof_probs.npy", "test_probs.npy", "tuned.json", "submission.csv")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as root:
        sys.exit(campaign(Path(root), options.kills, rng))


def campaign(root, kills, rng):
    """Kill `kills` times, in rounds that start from an empty folder; returns the exit status."""
    in_child(lambda: make_sample(root / "data", 16, 4), root / "sample.txt")
    begun = time.monotonic()
    steps = attempt(root, "undisturbed")
    wanted, spans = fingerprint(root / "undisturbed"), dict(zip(steps, np.diff([*steps.values()]), strict=False))
    print(f"undisturbed: {time.monotonic() - begun:.1f} s, {len(wanted)} files to compare", flush=True)
    same, left, number = True, kills, 0
    while left:
        targets = sorted(TARGETS[: min(left, len(TARGETS))], key=VERBS.index)
        for verb in targets:
            moment = rng.random() * spans[verb] / targets.count(verb)
            found = attempt(root, f"round{number}", (verb, moment))
            where = "nothing: it had ended" if "end" in found else [*found][-1]
            print(f"  round {number}: {moment:5.2f} s into {verb:8} killed in {where}{_detail(root, number, where)}")
        left, number = left - len(targets), number + 1
        attempt(root, f"round{number - 1}")
        found = fingerprint(root / f"round{number - 1}")
        differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        print(f"round {number - 1}: {'differs in ' + ', '.join(differ) if differ else 'the same bytes'}", flush=True)
        same &= not differ
    return 0 if same and wanted else 1


def attempt(root, name, kill=None):
    """Run the command in `root/name`, to its end or to the kill (verb, seconds into it).

    Returns {verb: time at which it began}, and `end`.
    """
    folder = root / name
    folder.mkdir(exist_ok=True)
    notes = folder / "steps.txt"
    notes.write_text("")
    argv = ["siim_pneumothorax", "run", "demo", "--data", str(root / "data"), "--out", str(folder / "run")]
    process = fork(lambda: run_noted([*argv, *TINY, *LONGER], folder, notes), folder / "output.txt")
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
            raise SystemExit(f"the run failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    return {verb: float(when) for verb, when in map(str.split, notes.read_text().splitlines())}


def run_noted(argv, folder, notes):
    """The command, with the moment at which each verb begins written to the file `notes`."""
    os.chdir(folder)

    def note(name):
        with open(notes, "a") as file:
            file.write(f"{name} {time.monotonic()}\n")

    def noted(name, verb):
        def run(context):
            note(name)
            verb(context)

        return run

    pipeline.VERBS.update({name: noted(name, verb) for name, verb in pipeline.VERBS.items()})
    status = solutions_main(argv)
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
    finally:
        os._exit(status if isinstance(status, int) else 0)


def in_child(work, output):
    """Run `work` in a child to its end: threads started here would be missing in the children after it."""
    if os.waitpid(fork(work, output), 0)[1]:
        raise SystemExit(output.read_text())


def fingerprint(folder):
    """SHA-256 of every file that must be the same, by its path in the run."""
    run = folder / "run"
    files = sorted(path for pattern in COMPARED for path in run.glob(pattern))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
