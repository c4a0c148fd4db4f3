"""Machine and session options, which every verb of every solution takes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import InputError, check
from common.extras import require_extra


@dataclass(frozen=True)
class Options:
    """Options of this machine and session, as opposed to the settings of the recipe: paths, devices, time."""

    data: Path | None = None  # Folder of the competition as Kaggle unpacks it; found automatically on Kaggle.
    out: Path | None = None  # Folder of the run (default: runs/<solution>-<preset>).
    config: Path | None = None
    """YAML file, or config.json of a run, with settings instead of the preset's; further options still win."""
    store: Path | None = None
    """Folder for the decoded images (default: stores/ beside the run; runs on the same data share it)."""
    hours: float | None = None
    """Save everything and stop after this time, in any verb; the same command continues. plan: hours of a session."""
    test: Path | None = None
    """Images to predict instead of the competition's: a folder, or a CSV whose first column names them."""
    id_map: Path | None = None  # CSV that maps image ids to patients, so that no patient is in two folds.
    fold_table: Path | None = None  # CSV `image_id,fold` of another run, to use the same folds.
    sizes: tuple[Path, ...] = ()  # CSV files with width and height of the originals, for resized copies of the images.
    normals: tuple[Path, ...] = ()  # Further folders of images without COVID-19, such as ChestX-ray14's or CheXpert's.
    on_bad_image: Literal["error", "placeholder", "skip"] = "error"
    """placeholder: a test image that cannot be read gets the neutral prediction; skip: besides, training images that
    cannot be read are left out (listed in left_out.csv, exit status 4)."""
    halve_jpeg2000: bool = False
    """Decode grey JPEG 2000 at a half, quarter … of its size where store_size needs no more: faster, other pixels."""
    on_unlabelled: Literal["error", "skip"] = "error"
    """skip: leave out image files that no table lists (the real SIIM download has some)."""
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>.
    workers: int | None = None
    """Most processes that read and augment images (default: one per core); fewer if memory or /dev/shm is scarce."""
    log_to: Literal["tensorboard", "wandb", "mlflow"] | None = None
    """Also log each epoch's figures there; a resumed training continues its run of the logger."""

    micro_batch: int | Literal["auto"] = 0
    """Images per pass of a training step, which adds up the gradients of the whole batch; 0: all; auto: on a GPU as
    many as fit. Refused where batch norms or the loss need the whole batch."""
    grad_checkpointing: bool = False
    """Keep few of a backbone's activations and compute the others again: much less memory, a third more time."""
    devices_per_training: int | None = None
    """Processes under torchrun that train one network together (default: one, or more if networks are fewer)."""

    pseudo: Path | None = None
    """Finished run or blend, whose confident predictions of this run's test images are trained on too."""
    pseudo_confidence: float = 0.8  # Least probability of a class, box or mask for --pseudo; 1 minus it of none.
    pseudo_weight: float = 1.0  # Times that --pseudo takes each image; 0.5: a random half of them.
    teacher: Path | None = None  # Finished run or blend, whose predictions of training images are mixed into labels.
    teacher_share: float = 0.5  # Share of the predictions of --teacher in the labels.
    teacher_confidence: float = 0.5  # Least score of a box of --teacher that an image with true boxes lacks.

    seeds: tuple[int, ...] = ()  # run: one run per seed, beside --out and on the folds of the first, blended into it.

    gpus: int | None = None  # plan: number of GPUs (default: those of this machine).
    card: str | None = None  # plan: their kind, such as T4 or H100, if this machine has none; costs are then estimates.
    kaggle: bool = False  # plan: a Kaggle notebook, that is two T4, sessions of 11.5 hours and 20 GB of disk.
    json: bool = False  # plan: print JSON.

    def __post_init__(self):
        if self.devices_per_training is not None and self.devices_per_training < 1:
            raise InputError(f"--devices-per-training must be at least 1, not {self.devices_per_training}")
        check(self.micro_batch == "auto" or self.micro_batch >= 0, f"--micro-batch is negative: {self.micro_batch}")
        check(self.gpus is None or self.gpus >= 1, f"--gpus must be at least 1, not {self.gpus}")
        check(0 < self.pseudo_confidence < 1, f"--pseudo-confidence {self.pseudo_confidence}: must lie between 0 and 1")
        check(self.pseudo_weight > 0, f"--pseudo-weight must be above 0, not {self.pseudo_weight}")
        for name in ("teacher_share", "teacher_confidence"):
            value = getattr(self, name)
            check(0 < value < 1, f"--{name.replace('_', '-')} {value}: must lie between 0 and 1")
        for name in ("pseudo_confidence", "pseudo_weight", "teacher_share", "teacher_confidence"):
            alone = getattr(self, name) != vars(Options)[name] and getattr(self, name.split("_")[0]) is None
            check(not alone, f"--{name.replace('_', '-')} needs --{name.split('_')[0]}")
        distinct = len(set(self.seeds)) == len(self.seeds) != 1 and min(self.seeds, default=0) >= 0
        check(distinct, f"--seeds {' '.join(map(str, self.seeds))}: name two or more, each once, none negative")
        check(self.workers is None or self.workers >= 0, f"--workers must not be negative: {self.workers}")
        if self.hours is not None and not self.hours > 0:
            raise InputError(f"--hours must be above 0, not {self.hours:g}")
        check_device(self.device)
        if self.log_to is not None:
            require_extra(self.log_to, f"--log-to {self.log_to}")


SPECIAL = ("sizes", "normals", "id_map", "on_unlabelled")  # options of some solutions only
PREPARING = ("data", "store", "test", "fold_table", "on_bad_image", "halve_jpeg2000", *SPECIAL)  # of `prepare`
PLANNING = ("gpus", "card", "kaggle", "json")  # options that only `plan` reads
FLAGS = ("--kaggle", "--json", "--grad-checkpointing", "--halve-jpeg2000")  # options without a value
MEMORY = ("micro_batch", "grad_checkpointing")  # options that only trainings and `plan` read
LESSONS = ("pseudo", "pseudo_confidence", "pseudo_weight", "teacher", "teacher_share", "teacher_confidence")
TRAINING = ("log_to", "devices_per_training", *MEMORY, *LESSONS)  # options that only trainings read
NO_TRAINING = ("prepare", "find_lr", "predict", "tune", "score", "submit", "report")
NO_NETWORK = ("tune", "score", "submit")


def hidden_options(verb, takes):
    """Return the names of the options that have no effect on a verb of a solution that `takes` these of SPECIAL."""
    hidden = {name for name in SPECIAL if name not in takes}
    if verb == "plan":
        return hidden | {"seeds", "fold_table", *TRAINING} - {*MEMORY, *LESSONS}
    hidden |= set(PLANNING) | (set() if verb == "run" else {"seeds"})
    hidden |= set() if verb in ("run", "prepare") else set(PREPARING)
    hidden |= set(TRAINING) if verb in NO_TRAINING else set()
    return hidden | ({"device", "workers"} if verb in NO_NETWORK else set())


def check_special(options, verb, takes, solution):
    """Raise InputError if an option is given that the solution does not take (SPECIAL) or that is only for `plan`."""
    wrong = {name: solution for name in SPECIAL if name not in takes}
    wrong |= dict.fromkeys(PLANNING, f"the verb {verb}") if verb != "plan" else {}
    wrong |= {"seeds": f"the verb {verb}"} if verb != "run" else {}
    for name, what in wrong.items():
        if getattr(options, name) != getattr(Options(), name):
            raise InputError(f"--{name.replace('_', '-')} does not apply to {what}")


def check_device(name):
    """Raise InputError unless `name`, the value of --device, is auto, cpu, cuda or cuda:<n> and this machine has it."""
    check(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name), f"--device {name!r}: choose auto, cpu, cuda or cuda:<n>")
    if name.startswith("cuda"):
        import torch

        if int(name[5:] or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs on this machine")
