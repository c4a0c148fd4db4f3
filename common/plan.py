"""The verb `plan`: what a run costs in time, memory and disk, before it is paid.

A few images of the challenge are prepared in a temporary folder, and networks take a few steps on them; everything else
follows from the numbers of images in the tables. Steps are timed on the device of this machine. For cards that it does
not have they are counted: operations and activations of a forward pass on the CPU, against a table of cards.
"""

import json
import math
import os
import shutil
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.blend import mixing_of
from common.config import BoxConfig, digest
from common.cost import KAGGLE_DISK, SLOW, Cost, Machine, machine_of, measure
from common.errors import InputError, check, log
from common.images import decode, prepare_images, with_folds
from common.infer import tta
from common.job import open_run
from common.listing import FURTHER, choose_images
from common.network import section_of
from common.predictions import predicting_networks
from common.runs import Run
from common.teaching import teachers_of
from common.train.passes import part_size
from common.train.variants import BN_BATCHES

GB, HOUR = 1e9, 3600
FEW, MORE, TESTS = 16, 40, 4  # images that are really prepared; more if the folds follow from what is in them
LONG_RUN = 1000  # images; of shorter runs nothing is announced
SMALLER = 10  # times that maps shrink, an assumption: `python -m benchmarks.maps` prints what real ones do


@dataclass(frozen=True)
class Stage:
    """The trainings of one stage. load: seconds to read an image in one process; part: images per pass, 0: a batch."""

    stage: str
    section: str
    trainings: int
    steps: int
    held_out: int
    load: float
    maps: int  # bytes of the maps of an image
    cost: Cost
    config: object = field(repr=False)
    part: int = 0
    watched: bool = False  # whether training images are measured after each epoch, too, as many as are held out

    def step_seconds(self, machine):
        """Return the time of a step, and of loading a batch while it runs or, without workers, before it."""
        batch = self.config.batch_size
        return batch * self.cost.train, batch * self.load / max(1, machine.workers)

    def seconds(self, machine):
        """Return the seconds of one training: steps, a validation per epoch, averages and their norms at the end."""
        step = (max if machine.workers else sum)(self.step_seconds(machine))
        averages = sum(name not in ("last", "best") for name in self.config.averaging)
        some = min(self.config.validate_images or self.held_out, self.held_out)
        ends = averages if some == self.held_out and not self.config.half_weights else len(self.config.averaging)
        seen = self.watched * some
        validations = self.config.epochs * (some + seen) + ends * (self.held_out + seen)
        return (self.steps + averages * min(BN_BATCHES, self.steps // self.config.epochs)) * step + (
            validations * self.predict_seconds(machine)
        )

    def predict_seconds(self, machine):
        """Return the seconds to predict an image; one that is not augmented loads in about half the time."""
        return (max if machine.workers else sum)((self.cost.predict, self.load / 2 / max(1, machine.workers)))

    def gib(self):
        """Return the memory of a training step."""
        return self.cost.gib(min(self.part or self.config.batch_size, self.config.batch_size))

    def disk(self):
        """Return the bytes that a training leaves, and those that it needs in addition while it runs."""
        config, weights = self.config, self.cost.weights
        kept = {"best_k": config.best_k, "window": 2 * config.window, "classic": config.epochs, "best": 1, "last": 1}
        epochs = min(config.epochs, sum(kept.get(name, 0) for name in config.averaging))
        left = (1 + len(config.averaging) * config.keep_variants) * weights // (1 + config.half_weights)
        saved = 2 + (config.optimizer != "sgd") + ("ema" in config.averaging)  # last.ckpt; twice while it is replaced
        return left, (epochs + 2 + max(len(config.averaging), 2 * saved)) * weights


@dataclass(frozen=True)
class Plan:
    """What a run will cost: its stages, hours by verb, GB of disk, and the limits that it would break."""

    machine: Machine
    images: dict
    stages: list
    hours: dict
    disk: dict
    problems: list


def plan(job):
    """Print what the run would cost. Raises InputError, naming the option that mends it, if it cannot fit."""
    teachers_of(job)  # refuses what is no run before anything is decoded
    found = estimate(job, job.recipe.read(job))
    print(json.dumps(as_dict(found), indent=1) if job.options.json else describe(job, found))
    check(not found.problems, "; ".join(found.problems))


def announce(job, listing):
    """Log in two lines what a long run will cost, and warn of limits that it would break, before it is paid.

    A run goes on without them if the few images cannot be planned with, since all of them may do.
    """
    if len(listing.table) < LONG_RUN:
        return
    try:
        found = estimate(job, listing)
    except InputError as error:
        log.info(f"what the run will cost is not known: {error}")
        return
    log.info("\n".join(_totals(found)))
    for problem in found.problems:
        log.warning(f"warning: {problem}")


def estimate(job, listing):
    """Return the Plan of the run of a Listing."""
    machine = machine_of(job.options)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        few, counts, prepare = prepare_few(job, listing, Path(folder))
        trainings = few.recipe.networks(few)
        known = {}
        stages = measure_all(few, listing, trainings, counts["share"], machine, known)
        few.run.close()
        lessons = measure_teachers(job, machine, counts, known)
    hours = add_hours(job, machine, trainings, stages, counts, prepare, lessons)
    disk = add_disk(job, machine, stages, counts, lessons)
    return Plan(machine, counts, stages, hours, disk, find_problems(job, machine, stages, disk))


# ---- measuring -----------------------------------------------------------------------------------------------------


def prepare_few(job, listing, folder):
    """Prepare a few images; return their job, the numbers of all images, and seconds per image to decode and refine."""
    n = max(FEW, job.config.n_folds) if listing.strata is not None else max(MORE, 8 * job.config.n_folds)
    chosen, took = choose_images(listing, n, TESTS, job.config.seed), []

    def refine(*of):
        begun = time.monotonic()
        found = job.recipe.refine(*of)
        took.append(time.monotonic() - begun)
        return found

    recipe = replace(job.recipe, read=lambda job: chosen, refine=refine)
    options = replace(job.options, store=folder / "stores", workers=1, fold_table=None)
    few = replace(job, options=options, run=Run(folder / "run"), recipe=recipe)
    begun = time.monotonic()
    decode(few, chosen)
    took.append(time.monotonic() - begun)
    prepare_images(few, recipe)
    counts = {split: int((listing.table["split"] == split).sum()) for split in ("train", "test", FURTHER)}
    share = max(1, int((chosen.table["split"] == "train").sum())) / max(1, counts["train"])
    return few, counts | {"share": share, "prepared": len(chosen.table)}, np.array(took) / len(chosen.table)


def measure_all(job, listing, trainings, share, machine, costs):
    """Return a Stage for each stage of the run, measured on the few images of `job`, this share of the Listing.

    costs: dict that receives what was measured, see `_measure_once`.
    """
    samples, found, whole = [], {}, replace(job)
    known = listing.kinds if listing.strata is None else listing.strata
    if known is not None:  # else folds follow from decoded images, which only `share` counts
        table = with_folds(job, replace(listing, strata=known)).table.assign(row=range(len(listing.table)), ok=True)
        whole.images, share = replace(job.images, table=table), 1
    for first in {network.stage: network for network in reversed(trainings)}.values():
        if first.needs:
            continue  # trained on the outputs of others, which takes little
        parts = first.rows(whole, first.fold)  # of few images, a fold may lack a label
        ids = whole.images.ids(parts[0])
        rows = job.images.rows_of(ids[np.isin(ids, job.images.table["image_id"])])
        rows = rows if len(rows) else job.images.rows()  # of classes that the few images do not have
        data, config = first.dataset(job, rows, True, True), first.config
        begun = time.monotonic()
        items = [data[index % len(data), index] for index in range(min(config.batch_size, 8))]
        load = (time.monotonic() - begun) / len(items)
        n, held = (len(part) / share for part in parts)
        if job.options.pseudo is not None and first.taught is not None:  # at most
            n += job.options.pseudo_weight * int((listing.table["split"] == "test").sum())
        steps = config.epochs * max(1, int(n * len(data) / len(rows) / config.batch_size))
        samples.append((first, items, steps, round(held), load))
    # from small images to large ones: the first slow network of a kind is measured, the others are compared with it
    for first, items, *counts in sorted(samples, key=lambda sample: sample[1][0][0].numel()):
        config, shape = first.config, items[0][0].shape
        cost = _measure_once(job, first, items, machine, costs)
        attempt = partial(cost.gib, most=machine.memory) if machine.gpus else None
        part = part_size(job.options.micro_batch, config.batch_size, cost.whole, attempt, first.stage)
        section, maps = section_of(job.config, first), first.channels * math.prod(shape[-2:])
        count = sum(each.stage == first.stage for each in trainings)
        found[first.stage] = Stage(first.stage, section, count, *counts, maps, cost, config, part, bool(first.watched))
    return [found[first.stage] for first, *_ in reversed(samples)]


def _measure_once(job, network, items, machine, costs):
    """Return the Cost of a network; `costs` has those of networks alike, and of each kind the first slow one's."""
    kind, shape = type(network.config), items[0][0].shape
    key = digest(kind.__name__, network.config, list(shape))
    if key not in costs:
        costs[key] = measure(job, network, items, machine, costs.get(kind))
        if costs[key].forward > SLOW:
            costs.setdefault(kind, costs[key])
    return costs[key]


def measure_teachers(job, machine, counts, costs):
    """Return the seconds in which the teachers of all folds predict, and the bytes of their maps, float (2,)."""
    each, config = np.zeros(2), job.config
    n_images = {"pseudo": counts["test"], "teacher": counts["train"] * (1 - 1 / config.n_folds)}
    for kind, folder in teachers_of(job).items():
        each += n_images[kind] * np.array(_measure_teacher(job, folder, machine, costs))
    return len(config.folds) * each


def _measure_teacher(job, folder, machine, costs):
    """Return the seconds in which the networks of one fold of a run or blend predict an image, and the maps' bytes."""
    with open_run(job.recipe, type(job.config), folder, device=job.options.device) as teacher:
        if teacher.is_blend:
            members = mixing_of(teacher)["folders"].values()
            return np.sum([_measure_teacher(job, each, machine, costs) for each in members], axis=0)
        teacher.refuse_derived()
        networks, rows, seconds, maps = predicting_networks(teacher), teacher.images.rows()[:8], 0, [0]
        for network in (each for each in networks if each.fold == networks[0].fold and not each.needs):
            data = network.dataset(teacher, rows, False, True)
            begun = time.monotonic()
            items = [data[index] for index in range(len(data))]
            load = (time.monotonic() - begun) / len(items) / max(1, machine.workers)
            once = _measure_once(teacher, network, items, machine, costs).predict
            seconds += (max if machine.workers else sum)((once, load)) * views_of(teacher.config, network.config)
            maps.append(network.channels * math.prod(items[0][0].shape[-2:]))
        return seconds, max(maps)


def views_of(config, network):
    """Return how many times an image is predicted by a network: its views and, of a detector, its sizes, in pixels."""
    sizes = 1 + sum(scale**2 for scale in getattr(config, "tta_scales", ())) if isinstance(network, BoxConfig) else 1
    return len(tta.views(getattr(config, "tta", ()))) * sizes


# ---- totals --------------------------------------------------------------------------------------------------------


def add_hours(job, machine, trainings, stages, counts, prepare, lessons=(0, 0)):
    """Return the hours of the verbs and in total.

    prepare: seconds per image to decode, on one core, and to refine; lessons: of `measure_teachers`.
    """
    devices, images = max(1, machine.gpus), count_images(counts)
    seconds = {each.stage: each.seconds(machine) for each in stages}
    found = {"prepare": images * (prepare[0] / machine.cores + prepare[1])}
    found |= {"teachers": lessons[0] / devices} if lessons[0] else {}
    found["train"] = makespan(trainings, lambda network: seconds.get(network.stage, 0.0), devices)
    sources = {network.starts_from.stage for network in trainings if network.starts_from is not None}
    predicted = (
        s.trainings * (s.held_out + counts["test"]) * s.predict_seconds(machine) * views_of(job.config, s.config)
        for s in stages
        if s.stage not in sources  # those only begin a training at a larger size
    )
    found["predict"] = sum(predicted) / devices
    found["total"] = sum(found.values())
    return {name: round(value / HOUR, 4) for name, value in found.items()}


def count_images(counts):
    """Return how many images are decoded, further ones to train on included."""
    return counts["train"] + counts["test"] + counts.get(FURTHER, 0)


def makespan(trainings, seconds, devices):
    """Return when the last of the Networks ends; a free device takes the first one whose sources have ended."""
    todo, running, now = list(trainings), {}, 0.0
    unfinished = {(network.fold, network.stage) for network in trainings}

    def can_begin(network):
        sources = [*network.needs, *([network.starts_from] if network.starts_from else [])]
        return not unfinished & {(source.fold, source.stage) for source in sources}

    while todo or running:
        for network in list(filter(can_begin, todo))[: devices - len(running)]:
            todo.remove(network)
            running[network.fold, network.stage] = now + seconds(network)
        now = min(running.values())
        unfinished -= {name for name, end in running.items() if end == now}
        running = {name: end for name, end in running.items() if end > now}
    return now


def add_disk(job, machine, stages, counts, lessons=(0, 0)):
    """Return the GB of the decoded images, of final weights, of predictions, and of what only training needs."""
    left, busy = zip(*(each.disk() for each in stages), strict=True)
    weights = sum(s.trainings * size for s, size in zip(stages, left, strict=True))
    predicted = counts["train"] * len(job.config.folds) / job.config.n_folds + counts["test"]
    images = count_images(counts) * job.config.store_size**2
    maps = (predicted * max(each.maps for each in stages) + lessons[1]) / SMALLER
    found = {"images": images, "weights": weights, "predictions": maps, "training": max(1, machine.gpus) * max(busy)}
    return {name: round(size / GB, 3) for name, size in found.items()}


def find_problems(job, machine, stages, disk):
    """Return the limits that the run would break, each with the option that mends it."""
    problems = []
    for each in stages:
        if each.gib() > machine.memory:
            where = "a GPU" if machine.gpus else "free memory"
            lacking = f"{each.stage}: {each.gib():.1f} GiB of {machine.memory} GiB of {where}"
            problems.append(f"{lacking}; {_smaller_batch(each, machine)}")
    run, most = job.options.out or Path("."), disk["weights"] + max(disk["predictions"], disk["training"])
    folders = {"--out": (run, most), "--store": (job.options.store or run, disk["images"])}
    if job.options.kaggle:
        folders.pop("--store")
    elif len({os.stat(_existing(folder)).st_dev for folder, _ in folders.values()}) == 1:
        folders = {"--out": (run, most + disk["images"])}
    for option, (folder, needed) in folders.items():
        free = KAGGLE_DISK if job.options.kaggle else shutil.disk_usage(_existing(folder)).free / GB
        if needed > free:
            problems.append(f"disk: {needed:.1f} GB of {free:.1f} GB; {option} on a larger disk, or fewer --folds")
    return problems


def _smaller_batch(stage, machine):
    """Return the options under which a step of the stage fits, with as many images per optimizer step."""
    batch, fits = stage.config.batch_size, int((machine.memory - stage.cost.fixed) / max(stage.cost.each, 1e-9))
    if fits > 0 and not stage.cost.whole:
        return f"--micro-batch {fits} would fit, with the same gradients"
    smaller = max((size for size in range(1, min(fits, batch - 1) + 1) if batch % size == 0), default=0)
    if not smaller:
        return "not even one image fits: choose a smaller network or size"
    accumulate = stage.config.accumulate * batch // smaller
    settings = f"--{stage.section}.batch-size {smaller} --{stage.section}.accumulate {accumulate}"
    return f"{settings} would fit, although {stage.cost.whole}"


def _existing(folder):
    folder = Path(folder).resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


# ---- output --------------------------------------------------------------------------------------------------------


def as_dict(plan):
    """Return a Plan as JSON; times in seconds and milliseconds, memory in GiB, disk in GB, weights in bytes."""

    def row(stage):
        step, load = stage.step_seconds(plan.machine)
        found = {name: value for name, value in vars(stage).items() if name not in ("cost", "config")}
        found |= {"batch_size": stage.config.batch_size, "step_ms": 1e3 * step, "load_ms": 1e3 * load}
        return found | {"gib": stage.gib(), "weights": stage.cost.weights, "seconds": stage.seconds(plan.machine)}

    return vars(plan) | {"machine": asdict(plan.machine), "stages": [row(stage) for stage in plan.stages]}


def describe(job, plan):
    """Return a Plan as text: a table of the stages and the totals."""
    machine, images = plan.machine, plan.images
    where = f"{machine.gpus} × {machine.card or 'GPU'}" if machine.gpus else f"{machine.cores} CPU cores"
    how = "an estimate by the card's data sheet" if machine.card else f"measured on {images['prepared']} images"
    rows = []
    for each in plan.stages:
        step, load = each.step_seconds(machine)
        row = {"stage": each.stage, "trainings": each.trainings, "steps": f"{each.steps:,}"}
        row |= {"ms a step": f"{1e3 * step:,.0f}", "ms to load": f"{1e3 * load:,.0f}"}
        row |= {"waits for": "images" if load > step else "network", "hours": f"{each.seconds(machine) / HOUR:.2f}"}
        rows.append(row | {"GiB": f"{each.gib():.1f}", "measured by": each.cost.how})
    lines = [
        f"{job.solution} {job.preset}: {images['train']:,} labelled and {images['test']:,} test images on {where}",
        pd.DataFrame(rows).to_string(index=False),
        f"(steps and hours are of one training; {how})",
    ]
    return "\n".join([*lines, *_totals(plan)])


def _totals(plan):
    hours = plan.machine.hours
    count = math.ceil(plan.hours["total"] / hours) if hours else 0
    sessions = f", {count} session{'s' * (count > 1)} of {hours:g} hours" if hours else ""
    sizes = ", ".join(f"{name} {value:.1f} GB" for name, value in plan.disk.items())
    return [
        "hours: " + ", ".join(f"{name} {value:.2f}" for name, value in plan.hours.items()) + sessions,
        f"disk: {sizes} until it ends; maps are assumed to shrink {SMALLER} ×",
    ]
