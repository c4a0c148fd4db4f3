"""The cost of a network's step, measured on this machine or counted for a card that it does not have."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from common import processes
from common.errors import check
from common.network import save_memory, to_device, training_loss
from common.nn.norms import set_frozen_eval
from common.nn.precision import autocast, precision
from common.train.passes import why_whole

GIB = 2**30
PATIENCE = 3.0  # seconds of timing per kind of network; slower ones are extrapolated from one or two images
SLOW = 1.0  # seconds; if one image's forward pass takes longer, time only that, if a similar network is known
EFFICIENCY = 0.3  # share of a card's peak performance that networks reach, a rule of thumb
CUDA_CONTEXT = 0.8  # GiB that CUDA itself needs
CARDS = {  # NVIDIA's data sheets: 16-bit TFLOP/s without sparsity, and usable memory in GiB
    "T4": (65, 14.7),
    "P100": (18.7, 15.9),
    "V100": (112, 15.7),
    "L4": (121, 22.0),
    "RTX3090": (71, 23.5),
    "RTX4090": (165, 23.5),
    "A100": (312, 39.4),
    "H100": (989, 79.1),
}
KAGGLE = {"gpus": 2, "card": "T4"}  # a notebook with two GPUs
KAGGLE_HOURS, KAGGLE_DISK, KAGGLE_CORES = 11.5, 20.0, 4  # GB in /kaggle/working; decoded images may be stored elsewhere


@dataclass(frozen=True)
class Machine:
    """The machine to plan for. card: of CARDS, "" for this machine. memory: GiB per device. hours: per session."""

    gpus: int
    card: str
    cores: int
    workers: int
    memory: float
    hours: float | None


@dataclass(frozen=True)
class Cost:
    """The cost of a network: seconds per image of training and prediction, GiB, bytes of its weights."""

    train: float
    predict: float
    fixed: float  # GiB, independent of the batch
    each: float  # GiB per image of a batch
    weights: int
    whole: str  # the result of passes.why_whole
    forward: float = 0.0  # seconds per image of the first forward pass of a training step
    how: str = ""  # the way of measuring

    def gib(self, images, most=math.inf):
        """Return a step's memory, GiB, for so many images. Raises torch.OutOfMemoryError if it exceeds `most`."""
        found = self.fixed + self.each * images
        if found > most:
            raise torch.OutOfMemoryError
        return found


def machine_of(options):
    """Return the Machine that the options ask for, by default this one."""
    given = {name: getattr(options, name) or (KAGGLE[name] if options.kaggle else None) for name in KAGGLE}
    here = torch.cuda.device_count() if options.device != "cpu" else 0
    card = given["card"] or ("T4" if given["gpus"] and not here else "")
    check(not card or card in CARDS, f"--card {card}: choose one of {', '.join(CARDS)}")
    gpus = given["gpus"] or here or int(bool(card))
    cores = KAGGLE_CORES if options.kaggle else processes.cores()
    workers = options.workers if options.workers is not None else cores // gpus if gpus else 0
    hours = options.hours or (KAGGLE_HOURS if options.kaggle else None)
    own = torch.cuda.get_device_properties(0).total_memory if gpus and not card else processes.free_memory()
    memory = CARDS[card][1] if card else own / GIB
    return Machine(gpus, card, cores, workers, round(memory, 1), hours)


def measure(job, network, items, machine, like=None):
    """Return the Cost of a network, from steps on copies of these items of its dataset.

    For a card that this machine lacks, the operations of a forward pass are counted. If `like`, the Cost of another
    network of the kind, is given, a slow network is timed on a forward pass only and assumed to be in proportion.
    """
    torch.manual_seed(job.config.seed)
    device, config = job.device, network.config
    dtype = torch.bfloat16 if machine.card and config.precision == "auto" else precision(device, config.precision)
    model = network.build("none").to(device, memory_format=torch.channels_last).train()
    save_memory(job, network, model)
    set_frozen_eval(model)
    whole = why_whole(model, network.couples)
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind([each for each in model.parameters() if each.requires_grad], lr=0.0)
    owned, saved = {each.untyped_storage().data_ptr() for each in model.parameters()}, {}

    def batch_of(count):
        return (network.collate or default_collate)([items[index % len(items)] for index in range(count)])

    def timed(work, *given):
        begun, result = time.monotonic(), work(*given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result, time.monotonic() - begun

    def forward(data):
        with autocast(device, dtype):
            return training_loss(network, device, model, data)

    def step(data):
        forward(data).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def predict(images):
        with autocast(device, dtype):
            model.eval()(images)

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # saved undetached, a result would keep its graph, and so the model, alive

    batch = config.batch_size
    few = min(2 if why_whole(model, False) else 1, batch)  # batch norms cannot train on one image
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    counter = FlopCounterMode(display=False)  # of the forward pass: it overestimates the backward pass
    with counter, saved_tensors_hooks(note, lambda tensor: tensor):
        seconds = timed(forward, batch_of(few))[1]
    weights = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    copies = 3 + (config.optimizer != "sgd") + ("ema" in config.averaging)  # including gradients and moments
    fixed, each = weights * copies / GIB + CUDA_CONTEXT * bool(machine.gpus), sum(saved.values()) / few / GIB
    found = partial(Cost, fixed=fixed, weights=weights, whole=whole, forward=seconds / few)
    if machine.card:
        once = counter.get_total_flops() / few / (EFFICIENCY * 1e12 * CARDS[machine.card][0])
        times = 3 + job.options.grad_checkpointing  # the backward pass costs twice the forward pass
        return found(times * once, once, each=each, how="operations")
    slow = device.type == "cpu" and seconds / few > SLOW
    if like is not None and slow:
        pace = seconds / few / like.forward
        return found(pace * like.train, pace * like.predict, each=each, how="forward pass")
    train, most, how = timed(step, batch_of(few))[1] / few, few, f"a step of {few}"
    if train * batch < PATIENCE or device.type == "cuda":
        with suppress(torch.OutOfMemoryError):  # then the step of few images shows how much memory is lacking
            times = [timed(step, batch_of(batch))[1] for _ in range(2 + min(8, int(PATIENCE / (train * batch))))]
            most, train, how = batch, min(times[1:]) / batch, f"{len(times)} steps"
    if device.type == "cuda":
        each = max(0.0, torch.cuda.max_memory_allocated(device) - weights * copies) / GIB / most
    images, _ = to_device(batch_of(most), device)
    once = min(timed(predict, images)[1] for _ in range(1 if slow else 2)) / most
    return found(train, once, each=each, how=how)
