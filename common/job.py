"""The Job that every verb of a solution gets: the run, its configuration, its images and this machine."""

import json
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from common import processes
from common.budget import Budget, keep_handlers
from common.config import digest, from_dict
from common.errors import InputError, check
from common.images import SAMPLE, open_images, trainings
from common.options import Options
from common.paths import copy_file, read_json, write_json
from common.predictions import prediction_files
from common.runs import Run
from common.step import is_current
from common.train import distributed

COPIED = ("images.parquet", "folds.csv", "left_out.csv", SAMPLE)


@dataclass
class Job:
    """One invocation of a verb.

    solution: its name; recipe: its common.recipe.Solution; left_out: number of unusable inputs, each named in the log;
    facts: the part of the Images' `about` that an export carries. lessons: records of teachers, see common.teaching,
    set while training.
    """

    solution: str
    preset: str
    config: Any
    options: Options
    run: Run
    device: Any
    budget: Any = field(repr=False)
    submissions: Path = Path("submissions")
    left_out: int = 0
    recipe: Any = field(default=None, repr=False)
    facts: dict = field(default_factory=dict, repr=False)
    lessons: dict = field(default_factory=dict, repr=False)

    @cached_property
    def images(self):
        """Return the prepared Images of the run. Raises InputError if `prepare` was not run, or with other settings."""
        return open_images(self)

    @cached_property
    def steps(self):
        """Return every Step of the solution by its name; a blend is predicted by the tool `blend` alone."""
        steps = self.recipe.steps()
        predict, tune = steps["predict"], steps["tune"]
        if self.is_blend:
            mixed = replace(predict, reads=lambda job: job.run.step("blend")["key"])
            derived = [replace(mixed, files=lambda job: (*predict.files(job), "blend.csv"))]
        elif self.run.step("refit") is not None:
            copied = replace(tune, reads=lambda job: job.run.step("refit")["key"], needs=())
            copied = replace(copied, files=("tuned.json", "score.json"))
            derived = [replace(predict, files=partial(prediction_files, names=["test"])), copied]
        else:
            return steps
        return steps | {step.name: replace(step, make=Job.refuse_derived) for step in (*derived, steps["find_lr"])}

    @property
    def is_blend(self):
        """Return whether the run is a blend of others, see common.blend."""
        return self.run.step("blend") is not None

    def refuse_derived(self):
        """Raise InputError if the run is a blend or a refit, whose networks are not trained by folds."""
        if self.is_blend:
            raise InputError(f"{self.run.folder}: a blend has no networks of its own; use its runs, or `blend` again")
        if self.run.step("refit") is not None:
            raise InputError(f"{self.run.folder}: trained on all images; use the run it comes from, or `refit` again")

    @property
    def sample_path(self):
        """Return the path of the sample submission: all required ids, with neutral answers."""
        return self.run.path(SAMPLE)

    @property
    def workers(self):
        """Return the number of loader processes: 0 on a CPU, where the network itself keeps all cores busy."""
        if self.options.workers is not None:
            return self.options.workers
        return max(1, processes.cores() // processes.count_here()) if self.device.type == "cuda" else 0

    def is_current(self, name):
        """Return whether the step `name` has a result for the present settings and earlier steps."""
        return is_current(self, self.steps[name])

    def keep_config(self):
        """Store this configuration as the run's, after a step that used it."""
        self.run.write_config(self.solution, self.preset, self.config)

    def with_config(self, **changes):
        """Return a copy of this job with the same images and with fields of the configuration replaced."""
        other = replace(self, config=replace(self.config, **changes))
        other.__dict__["images"] = self.images
        return other


def derive_run(job, out, config, kind, key, inputs=(), **about):
    """Make the folder `out` a run with a Job's images and a record of its `kind`, blend or refit.

    Raises InputError if it holds another run.
    """
    with closing(Run(out)) as run:
        steps, prepared = run.manifest.get("steps", {}), job.run.step("prepare")
        check(not steps or kind in steps, f"--out {out}: holds a run that is no {kind}; name a new folder")
        before, settings = steps.get(kind, {}), json.loads(json.dumps(about.get("settings")))
        same = digest(key) == before.get("key") or before.get("run") == about.get("run")
        if trainings(run) and not (same and settings == before.get("settings")):
            raise InputError(f"--out {out}: holds another {kind}, of {before.get('run')}; name a new folder")
        for name in (*COPIED, *prepared["tables"]):
            if job.run.path(name).is_file():
                copy_file(job.run.path(name), run.path(name))
        run.describe(config.seed, inputs)
        write_json(run.path("manifest.json"), run.manifest | {"steps": {**steps, "prepare": prepared}})
        run.record(kind, key, **about)
        run.write_config(job.solution, kind, config)


def open_run(recipe, config_class, folder, **options):
    """Return a context with the Job of the run in `folder`, with its stored configuration and these Options.

    Raises InputError if the folder is not a run of this solution, or if another process works in it.
    """
    stored = Path(folder) / "config.json"
    check(stored.is_file(), f"{folder}: not the folder of a finished run (no config.json)")
    values = read_json(stored)
    if not isinstance(values, dict) or values.pop("solution", None) != recipe.name:
        raise InputError(f"{stored}: not the configuration of a run of {recipe.name}")
    preset = values.pop("preset", "stored")
    return open_job(recipe, preset, from_dict(config_class, values, str(stored)), Options(out=folder, **options))


@contextmanager
def open_job(recipe, preset, config, options, **more):
    """Yield the Job of these settings and `more` of its fields; Options.out is its run."""
    device = distributed.start(options.device)
    with closing(Run(options.out)) as run, keep_handlers():
        job = Job(recipe.name, preset, config, options, run, device, Budget(options.hours), recipe=recipe, **more)
        job.recipe = recipe.pick(job, "export") or recipe
        yield job
