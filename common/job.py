"""What every verb of a solution works on: the run, its configuration, its images and this machine."""

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common import processes
from common.images import SAMPLE, open_images
from common.options import Options
from common.runs import Run
from common.step import is_current


@dataclass
class Job:
    """One invocation of a verb. `solution` is its name, `recipe` its common.recipe.Solution, `left_out` the number of
    inputs that could not be used and were named."""

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

    @cached_property
    def images(self):
        """The prepared Images of the run. Raises InputError before `prepare`, or after other settings."""
        return open_images(self)

    @cached_property
    def steps(self):
        """Every Step of the solution by its name."""
        return self.recipe.steps()

    @property
    def sample_path(self):
        """Path of the sample submission: the ids that a submission must have, with neutral answers."""
        return self.run.path(SAMPLE)

    @property
    def workers(self):
        """Worker processes of a loader: none on a CPU, where the cores are busy with the network itself."""
        if self.options.workers is not None:
            return self.options.workers
        return len(os.sched_getaffinity(0)) // processes.world() if self.device.type == "cuda" else 0

    def is_current(self, name):
        """Return whether the result of the step `name` belongs to the present settings and earlier steps."""
        return is_current(self, self.steps[name])

    def keep_config(self):
        """Store this configuration as the run's: what was made last agrees with it."""
        self.run.write_config(self.solution, self.preset, self.config)

    def with_config(self, **changes):
        """Return a copy of this job on the same images with fields of the configuration replaced."""
        other = dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))
        other.__dict__["images"] = self.images
        return other
