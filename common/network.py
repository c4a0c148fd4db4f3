"""One training of a recipe: its model, data, loss and metrics; `train` and `predict` do the rest for every solution."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch

from common import processes
from common.config import FitConfig, digest, to_dict
from common.data.loaders import EpochSampler, eval_loader, make_loader
from common.errors import check, log
from common.images import trainings
from common.infer import tta
from common.infer.predict import predict_masks, predict_probs
from common.nn.models import checkpoint_backbone, timm_name
from common.nn.onnx import with_session
from common.nn.weights import check_weights
from common.paths import read_csv, write_csv
from common.step import cached_hash, changed_settings, run_step
from common.teaching import describe_lessons, teach
from common.train import distributed
from common.train.checkpoint import load_weights
from common.train.loggers import open_log
from common.train.loop import fit
from common.train.lr_finder import find_learning_rate


def other_folds(job, fold):
    """Return the store rows of all other folds, and those of the fold itself."""
    others = [k for k in range(job.config.n_folds) if k != fold]
    return job.images.rows(folds=others), job.images.rows(folds=[fold])


@dataclass(frozen=True)
class Network:
    """One training: the network `stage` of one fold, in the run's folder fold<k>/<stage>.

    config: its FitConfig. build(weights) -> nn.Module; weights None: as configured, "none": random.
    dataset(job, rows, augment, targets) -> Dataset of (image, target), or of (image, store row) without targets.
    loss(output, target) -> scalar, the mean over images unless `couples`; its validation value is logged as `loss`.
    measure(output, target) -> array or tensor (B, …), one entry per held-out image. figures(job, measured (n, …), rows)
    -> dict of metrics.
    rows(job, fold) -> (store rows to train on, rows held out). freeze(model, frozen): as in `fit`.
    taught(job, rows) -> those rows with a teacher's labels that are added to the training set; None: it takes none.
    sampling(job, rows) -> further options of the EpochSampler. step(model, images, target) -> loss, in place of
    loss(model(images), target). before_epoch(history): called before each epoch; may change what `step` does.
    collate: turns a list of items into a batch. starts_from: the Network whose final weights are the initial ones.
    needs: Networks whose weights the dataset depends on. key: JSON on which the training depends beside its config.
    watched: metrics that are also measured after each epoch on training images, without augmentation and on as many as
    are held out, and logged as train_<name>. trained_on(job) -> JSON for the metadata of the weights file.
    activation: turns output into probabilities. channels: number of predicted maps, 0 if it predicts vectors.
    batch_size: for prediction; 0: twice that of training.
    """

    fold: int
    stage: str
    config: FitConfig
    build: Callable
    dataset: Callable
    loss: Callable | None
    measure: Callable
    figures: Callable
    rows: Callable = other_folds
    freeze: Callable | None = None
    taught: Callable | None = lambda job, rows: rows
    sampling: Callable = lambda job, rows: {}
    step: Callable | None = None
    before_epoch: Callable = lambda history: None
    couples: bool = False
    collate: Callable | None = None
    starts_from: "Network | None" = None
    needs: tuple = ()
    key: object = None
    watched: tuple = ()
    trained_on: Callable = lambda job: None
    activation: Callable = tta.sigmoid
    channels: int = 0
    batch_size: int = 0

    def folder(self, run):
        """Return the folder of the training in a run."""
        return run.path(f"fold{self.fold}", self.stage)

    def is_finished(self, run):
        """Return whether the training has ended."""
        return (self.folder(run) / "final.safetensors").is_file()

    def weights(self, run):
        """Return the path of the trained weights. Raises InputError if the training is not finished."""
        path, hint = self.folder(run) / "final.safetensors", "run `train`, or name the trained folds by --folds"
        check(path.is_file(), f"{path}: fold {self.fold} is not trained; {hint}")
        return path

    def load(self, run, variant=None):
        """Return the network with its trained weights, or with those of an averaging variant."""
        model = self.build("none")
        path = self.folder(run) / "variants" / f"{variant}.safetensors" if variant else self.weights(run)
        load_weights(path, model)
        return model


def to_device(value, device):
    """Return a batch's part on `device`: a tensor, or tensors nested in lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    return [to_device(part, device) for part in value]


def train(job, network, later=()):
    """Train one network, or read a finished training; return `fit`'s Fitted.

    later: the networks still to be trained after it, from which the remaining time is estimated.
    """
    network = with_rate(job, network)
    config, seed, folder = network.config, job.config.seed, network.folder(job.run)
    rows, held_out = network.rows(job, network.fold)
    pupil, more, lesson = teach(job, network, held_out)
    sources = [*network.needs, *([network.starts_from] if network.starts_from else [])]
    before = [cached_hash(source.weights(job.run)) for source in sources]
    finished = network.is_finished(job.run)
    loader = None if finished else train_loader(pupil, network, np.concatenate([rows, more]))
    some = held_out
    if 0 < config.validate_images < len(held_out):
        some = np.sort(np.random.default_rng(seed).choice(held_out, config.validate_images, replace=False))
    drawn = np.random.default_rng(seed).permutation(rows)[: len(some)] if network.watched else []
    held_data, seen_data, all_data = (
        None if finished or not len(part) else network.dataset(job, part, False, True)
        for part in (some, drawn, held_out if some is not held_out else [])
    )

    def measure(model, data, rows):
        batch, pinned = 2 * config.batch_size, job.device.type == "cuda"
        share = range(len(rows))[distributed.share(len(rows), batch)]
        batches = eval_loader(data, batch, job.workers, share, pinned, collate=network.collate)
        parts, losses = [], []
        for batch in batches:
            images, target = to_device(batch, job.device)
            output = model(images)
            parts.append(torch.as_tensor(network.measure(output, target)).cpu().numpy())
            losses += [network.loss(output, target).item() if network.loss else 0.0] * len(parts[-1])
        measured = distributed.join(np.concatenate(parts) if parts else [])
        losses = distributed.join(losses)
        finite = np.isfinite(measured).all()
        check(finite, "the network produced NaN or infinity: lower the learning rate or set clip_norm")
        own = {"loss": losses.mean()} if network.loss else {}
        return own | network.figures(job, measured, rows)

    def validate(model, data=held_data, held_out=some):
        seen = measure(model, seen_data, drawn) if network.watched else {}
        return measure(model, data, held_out) | {f"train_{name}": seen[name] for name in network.watched}

    torch.manual_seed(seed + network.fold)
    model = network.build("none" if finished or (folder / "last.ckpt").is_file() else None)
    if network.starts_from is not None and not finished:
        load_weights(network.starts_from.weights(job.run), model)
    about = [job.images.key, network.fold, network.stage, digest(rows.tolist(), held_out.tolist()), before, network.key]
    origin = network.trained_on(job)
    if lesson:
        about.append(lesson)
        origin = (origin or {}) | {"taught": describe_lessons(job.run)}
    options = {name: getattr(network, name) for name in ("freeze", "couples", "before_epoch")}
    options |= {"device": job.device, "seed": seed + network.fold, "budget": job.budget}
    options |= {"about": about, "trained_on": origin, "changed": changed_settings(job)}
    options["micro_batch"] = job.options.micro_batch
    options["seconds_to_come"] = partial(seconds_to_come, job.run, later, network.stage)
    options["validate_all"] = partial(validate, data=all_data, held_out=held_out) if all_data is not None else None
    save_memory(job, network, model)
    with open_log(job, network, finished) as on_epoch:
        step = partial(training_loss, network, job.device)
        fitted = fit(model, step, loader, validate, config, folder, on_epoch=on_epoch, **options)
        if on_epoch is not None:
            on_epoch(fitted.history.to_dict("records"))
    return fitted


def save_memory(job, network, model):
    """Switch gradient checkpointing on in a Network's model if --grad-checkpointing is given and it has a backbone."""
    if job.options.grad_checkpointing and hasattr(network.config, "weights"):
        checkpoint_backbone(model)


def check_initial_weights(job):
    """Raise InputError, naming the option, if the pretrained weights of a future training cannot be loaded."""
    checked, begun = set(), trainings(job.run)
    for network in job.recipe.networks(job):
        config = network.config
        if network.folder(job.run) in begun or network.starts_from is not None or not hasattr(config, "weights"):
            continue
        option = f"--{section_of(job.config, network)}.weights"
        backbone = getattr(config, "backbone", None) or config.encoder
        if (backbone, config.weights) not in checked:
            check_weights(timm_name(backbone) if backbone else "", config.weights, option)
        checked.add((backbone, config.weights))


def section_of(config, network):
    """Return the name of the configuration's section from which a Network's settings come."""
    alike = [name for name, section in vars(config).items() if type(section) is type(network.config)]
    return network.stage if network.stage in alike else alike[0]


def seconds_to_come(run, networks, stage, pace):
    """Return the seconds that `networks` will take.

    pace: seconds per epoch of `stage`; other stages are assumed to be as fast as in the folds where they were trained.
    """
    paces = {stage: pace}
    for other in {network.stage for network in networks} - {stage}:
        tables = map(read_csv, run.folder.glob(f"fold*/{other}/history.csv"))
        known = [table["seconds"].mean() for table in tables if "seconds" in table]
        paces[other] = np.mean(known) if known else pace
    return sum(network.config.epochs * paces[network.stage] for network in networks)


def with_rate(job, network):
    """Return the network with `lr` auto replaced by the range test's suggestion, a tenth of it after frozen epochs."""
    if network.config.lr != "auto":
        return network
    check(processes.count() <= 1 or job.is_current("find_lr"), "lr auto: run `find_lr` first, in a single process")
    run_step(job, job.steps["find_lr"])
    found = float(read_csv(job.run.path(f"lr_{network.stage}.csv"))["suggestion"].iloc[0])
    later = found / 10 if network.config.frozen_epochs else found
    return replace(network, config=replace(network.config, lr=later, frozen_lr=found))


def training_loss(network, device, model, batch):
    """Return the loss of a batch of the Network's loader, a scalar tensor on `device`."""
    images, target = to_device(batch, device)
    return network.step(model, images, target) if network.step else network.loss(model(images), target)


def train_loader(job, network, rows):
    """Return the DataLoader for training on these store rows."""
    config, seed = network.config, job.config.seed
    dataset = network.dataset(job, rows, True, True)
    place = {"rank": distributed.rank(), "world": distributed.world()}
    sampler = EpochSampler(len(dataset), config.batch_size, seed, **place, **network.sampling(job, rows))
    return make_loader(dataset, sampler, job.workers, seed, job.device.type == "cuda", collate=network.collate)


def predict(job, networks, rows, views=(tta.IDENTITY,), title="", path=None, variant=None):
    """Return the mean probabilities of store rows over networks of one stage and over views, float32 (n, C).

    With `path`, maps are written there as in `predict_masks`. variant: of averaging, instead of the final weights.
    """
    first = networks[0]
    batch = first.batch_size or 2 * first.config.batch_size
    options = {"batch_size": batch, "device": job.device, "views": views, "amp": first.config.precision}
    options |= {"activation": first.activation, "workers": job.workers, "progress": f"{first.stage}, {title}"}
    models = [network.load(job.run, variant) for network in networks]
    if job.device.type == "cpu" and variant is None:
        files = [network.folder(job.run) / "final.onnx" for network in networks]  # which only `infer` has
        models = [with_session(*each) for each in zip(models, files, strict=True)]
    dataset = first.dataset(job, rows, False, False)
    if path is None:
        return predict_probs(models, dataset, **options)
    return predict_masks(models, dataset, path, first.channels, **options)


def compute(job, network, model, function, rows, title, device=None, amp="fp32"):
    """Return function(images) of a Network's images of store rows, float32 (n, …), with `model` on the device.

    device: by default the job's. title: of the progress bar.
    """
    model.to(device or job.device, memory_format=torch.channels_last).eval()
    how = {"batch_size": 2 * network.config.batch_size, "device": device or job.device, "workers": job.workers}
    how |= {"amp": amp, "activation": torch.Tensor.float, "progress": title}
    return predict_probs([function], network.dataset(job, rows, False, False), **how)


def first_networks(job):
    """Return the networks of the first trained fold that need no other network's weights."""
    trainings = job.recipe.networks(job)
    return [one for one in trainings if one.fold == trainings[0].fold and not (one.starts_from or one.needs)]


def rates_files(job):
    """Return the names of the files of `find_learning_rates`."""
    return [f"lr_{network.stage}.csv" for network in first_networks(job)]


def rates_key(job):
    """Return everything that range tests depend on: images, settings of the networks, seed."""
    return [job.images.key, [to_dict(network.config) for network in first_networks(job)], job.config.seed]


def find_learning_rates(job, networks=None):
    """Run range tests of Networks (by default `first_networks`) as in their first epoch; write lr_<stage>.csv."""
    for network in networks or first_networks(job):
        config = network.config
        torch.manual_seed(job.config.seed)
        model = network.build(None).to(job.device)
        if network.freeze is not None:
            network.freeze(model, config.frozen_epochs > 0)
        loader = train_loader(job, network, network.rows(job, network.fold)[0])
        loader.batch_sampler.set_epoch(0, config.epochs)
        step = partial(training_loss, network, job.device)
        settings = {"weight_decay": config.weight_decay, "wanted": config.precision}
        rates, losses, found = find_learning_rate(model, step, loader, **settings)
        table = pd.DataFrame({"lr": rates, "loss": losses, "suggestion": found})
        write_csv(job.run.path(f"lr_{network.stage}.csv"), table)
        used = config.frozen_lr if config.frozen_epochs and config.lr != "auto" else config.lr
        log.info(f"{network.stage}: the loss falls fastest at {found:.2e}; the configuration has {used}")
