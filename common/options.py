"""Machine and session options, which every verb of every solution takes."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from common.errors import InputError, check
from common.extras import require_extra


@dataclass(frozen=True)
class Options:
    """Options for the machine and the session (paths, devices, time), as opposed to the recipe's settings."""

    data: Path | None = None  # Folder of the competition as Kaggle unpacks it; found automatically on Kaggle.
    out: Path | None = None  # Folder of the run (default: runs/<solution>-<preset>).
    config: Path | None = None
    """YAML file, or config.json of a run, with settings that replace the preset's; command-line options override it."""
    store: Path | None = None
    """Folder for the decoded images (default: stores/ next to the run; runs on the same data share it)."""
    hours: float | None = None
    """Save everything and stop after this time, in any verb; the same command continues. plan: hours per session."""
    test: Path | None = None
    """Images to predict instead of the competition's: a folder, or a CSV whose first column names them."""
    id_map: Path | None = None  # CSV that maps image ids to patients, so that no patient is in two folds.
    fold_table: Path | None = None  # CSV `image_id,fold` of another run, to use the same folds.
    sizes: tuple[Path, ...] = ()  # CSV files with width and height of the originals, for resized copies of the images.
    normals: tuple[Path, ...] = ()  # Further folders of images without COVID-19, such as ChestX-ray14's or CheXpert's.
    on_bad_image: Literal["error", "placeholder", "skip"] = "error"
    """placeholder: a test image that cannot be read gets the neutral prediction; skip: in addition, unreadable training
    images are left out (listed in left_out.csv, exit status 4)."""
    halve_jpeg2000: bool = False
    """Decode grey JPEG 2000 at a half, quarter … of its size if store_size allows: faster, slightly other pixels."""
    on_unlabelled: Literal["error", "skip"] = "error"
    """skip: leave out image files that no table lists (the real SIIM download has some)."""
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>.
    workers: int | None = None
    """Processes that read and augment images, at most (default: 1 per core); fewer if memory or /dev/shm is scarce."""
    log_to: Literal["tensorboard", "wandb", "mlflow"] | None = None
    """Also log each epoch's metrics to this logger; a resumed training continues its record there."""

    micro_batch: int | Literal["auto"] = 0
    """Images per pass; a training step adds up the gradients over the whole batch. 0: the whole batch; auto: as many as
    fit on the GPU. Refused if batch norms or the loss need the whole batch."""
    grad_checkpointing: bool = False
    """Keep few of a backbone's activations and recompute the others: much less memory, a third more time."""
    devices_per_training: int | None = None
    """Processes under torchrun that train one network together (default: 1, or more if there are fewer networks)."""

    pseudo: Path | None = None
    """Finished run or blend whose confident predictions of this run's test images become pseudo-labels."""
    pseudo_confidence: float = 0.8  # Least probability of a class, box or mask for --pseudo; 1 minus it for none.
    pseudo_weight: float = 1.0  # --pseudo: how often each image is used; 0.5: a random half of the images.
    teacher: Path | None = None  # Finished run or blend whose predictions of training images are mixed into labels.
    teacher_share: float = 0.5  # --teacher: share of the predictions in the labels.
    teacher_confidence: float = 0.5  # --teacher: minimum score of boxes added to images that have true boxes.

    seeds: tuple[int, ...] = ()  # run: one run per seed, next to --out and all on the same folds, blended into --out.

    gpus: int | None = None  # plan: number of GPUs (default: those of this machine).
    card: str | None = None  # plan: kind of GPU, such as T4 or H100, if this machine lacks it; costs are estimated.
    kaggle: bool = False  # plan: for a Kaggle notebook with two T4, sessions of 11.5 hours and 20 GB of disk.
    json: bool = False  # plan: print JSON.

    def __post_init__(self):
        for name in ("devices_per_training", "gpus"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{flag(name)} must be at least 1, not {value}")
        check(self.micro_batch == "auto" or self.micro_batch >= 0, f"--micro-batch is negative: {self.micro_batch}")
        finite = 0 < self.pseudo_weight < math.inf
        check(finite, f"--pseudo-weight must be a finite number above 0, not {self.pseudo_weight}")
        for name in ("pseudo_confidence", "teacher_share", "teacher_confidence"):
            check(0 < getattr(self, name) < 1, f"{flag(name)} {getattr(self, name)}: must lie between 0 and 1")
        for name, kind in ((name, name.split("_")[0]) for name in LESSONS):
            alone = getattr(self, name) != vars(Options)[name] and getattr(self, kind) is None
            check(not alone, f"{flag(name)} needs {flag(kind)}")
        distinct = len(set(self.seeds)) == len(self.seeds) != 1 and min(self.seeds, default=0) >= 0
        check(distinct, f"--seeds {' '.join(map(str, self.seeds))}: name two or more, each once, none negative")
        check(self.workers is None or self.workers >= 0, f"--workers must not be negative: {self.workers}")
        if self.hours is not None and not self.hours > 0:
            raise InputError(f"--hours must be above 0, not {self.hours:g}")
        check_device(self.device)
        if self.log_to is not None:
            require_extra(self.log_to, f"--log-to {self.log_to}")


def flag(name):
    """Return how an option is written on the command line."""
    return f"--{name.replace('_', '-')}"


SPECIAL = ("sizes", "normals", "id_map", "on_unlabelled")  # options that only some solutions have
PREPARING = ("data", "store", "test", "fold_table", "on_bad_image", "halve_jpeg2000", *SPECIAL)  # of `prepare`
PLANNING = ("gpus", "card", "kaggle", "json")  # options that only `plan` reads
FLAGS = tuple(flag(field.name) for field in fields(Options) if field.type is bool)  # options without a value
MEMORY = ("micro_batch", "grad_checkpointing")  # options that only trainings and `plan` read
LESSONS = ("pseudo", "pseudo_confidence", "pseudo_weight", "teacher", "teacher_share", "teacher_confidence")
TRAINING = ("log_to", "devices_per_training", *MEMORY, *LESSONS)  # options that only trainings read
NO_TRAINING = ("prepare", "find_lr", "predict", "tune", "score", "submit", "report")
NO_NETWORK = ("tune", "score", "submit")


def hidden_options(verb, takes):
    """Return the names of options without effect on a verb of a solution that `takes` these options of SPECIAL."""
    hidden = {name for name in SPECIAL if name not in takes}
    if verb == "plan":
        return hidden | {"seeds", "fold_table", *TRAINING} - {*MEMORY, *LESSONS}
    hidden |= set(PLANNING) | (set() if verb == "run" else {"seeds"})
    hidden |= set() if verb in ("run", "prepare") else set(PREPARING)
    hidden |= set(TRAINING) if verb in NO_TRAINING else set()
    return hidden | ({"device", "workers"} if verb in NO_NETWORK else set())


def check_special(options, verb, takes, solution):
    """Raise InputError for an option that the solution does not take (SPECIAL) or that does not apply to the verb."""
    wrong = {name: solution for name in SPECIAL if name not in takes}
    wrong |= dict.fromkeys(PLANNING, f"the verb {verb}") if verb != "plan" else {}
    wrong |= {"seeds": f"the verb {verb}"} if verb != "run" else {}
    for name, what in wrong.items():
        check(getattr(options, name) == vars(Options)[name], f"{flag(name)} does not apply to {what}")


def check_device(name):
    """Raise InputError unless `name` (--device) is auto, cpu, cuda or cuda:<n>, and the machine has that device."""
    check(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name), f"--device {name!r}: choose auto, cpu, cuda or cuda:<n>")
    if name.startswith("cuda"):
        import torch

        count = torch.cuda.device_count()
        check(int(name[5:] or 0) < count, f"--device {name}: torch sees {count} GPUs on this machine")
