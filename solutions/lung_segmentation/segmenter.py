"""Load a trained network with its decision rule from one file, and turn radiographs of any size into masks.

segmenter = load_segmenter()                      # the shipped weights
masks = list(segmenter.masks(images))             # uint8 (H, W) of 0 and 1
for image_id, image, mask, problem in segmenter.read({"a": "a.png", "b": "b.dcm"}): ...
"""

import copy
import itertools
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from common import processes
from common.config import file_hash, from_dict
from common.data.dicom import COLOUR_LIMIT, read_image_and_header
from common.data.store_workers import to_square
from common.errors import InputError
from common.infer.tta import predict_tta, views
from common.nn.onnx import Fastest, OnnxSession, to_onnx
from common.nn.precision import autocast, precision
from common.train.checkpoint import load_weights, save_weights

from .config import STRUCTURES, NetworkConfig
from .models import build_network
from .postprocess import MaskRule

log = logging.getLogger(__name__)
_notes = set()

SHIPPED = Path(__file__).parent / "weights" / "lungs.safetensors"
FORMAT = 1
_NETWORK = ("architecture", "encoder", "decoder", "size")  # the fields of NetworkConfig that shape a network


def save_segmenter(path, model, about):
    """Write a network and everything that its masks depend on as one safetensors file of half-precision weights.

    about: JSON values with `network`, `structures`, `pixel` and `regions`. One-dimensional tensors stay in float32: a
    running variance can exceed float16. Raises InputError if something is missing or a weight exceeds it.
    """
    network = about.get("network", {})
    network = asdict(network) if is_dataclass(network) else network
    about = about | {"format": FORMAT, "network": {name: network[name] for name in _NETWORK if name in network}}
    _read_description(about, path)
    state = {name: value.half() if value.ndim > 1 else value for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: {name} has values outside the range of half precision")
    save_weights(path, state, **about)


def load_segmenter(weights=None, device=None, tta=(), batch_size=4, precision="auto", onnx=False):
    """Return the Segmenter in a file written by `save_segmenter`; None: the shipped one, whose hash is checked.

    device: a torch.device or its name; None: a GPU if available. tta: further views to average, of "flip" and "scale".
    batch_size: images per batch of each thread. precision: as in `common.nn.precision.precision`. onnx: on a CPU, use
    ONNX Runtime if it is faster for the first batch. Raises InputError for another kind of file and for invalid
    arguments.

    >>> load_segmenter(device="cpu").structures
    ('left', 'right', 'heart')
    """
    path = SHIPPED if weights is None else Path(weights)
    if weights is None:
        _check_shipped(path)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    _, about = load_weights(path)
    network, structures, rule = _read_description(about, path)
    if not set(tta) <= {"flip", "scale"}:
        raise InputError(f"tta {tuple(tta)}: choose from flip and scale")
    model = build_network(network, len(STRUCTURES[structures]), "none")
    load_weights(path, model)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _without_norms(model.eval(), network.size)
    if onnx and device.type == "cpu":
        example = torch.zeros(1, 1, network.size, network.size, dtype=torch.uint8)
        model = Fastest(model, OnnxSession(to_onnx(model, example, str(path)), threads=1), "lung segmenter")
    return Segmenter(
        model, network.size, structures, rule, views(tta, structures != "lungs"), device, batch_size, precision, about
    )


def _check_shipped(path):
    pinned = path.with_suffix(".sha256")
    for file in (path, pinned):
        if not file.is_file():
            raise InputError(f"{file}: the shipped weights are missing; name a file with --weights")
    if file_hash(path) != pinned.read_text().split()[0]:
        raise InputError(f"{path}: not the weights that were shipped (their SHA-256 differs); fetch the file again")


def _read_description(about, path):
    """Return the NetworkConfig, the key of STRUCTURES and the MaskRule in a file's metadata."""
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: not a lung segmenter of format {FORMAT}, as written by the verb `export_segmenter`")
    missing = [name for name in ("network", "structures", "pixel", "regions") if name not in about]
    network = about.get("network")
    missing += [f"network.{name}" for name in _NETWORK if isinstance(network, dict) and name not in network]
    if missing:
        raise InputError(f"{path}: has no {missing[0]}")
    if not isinstance(network, dict) or not isinstance(network["decoder"], list | tuple):
        raise InputError(f"{path}: describes no network")
    if str(about["structures"]) not in STRUCTURES:
        raise InputError(f"{path}: structures {about['structures']!r} is not one of {', '.join(STRUCTURES)}")
    network = from_dict(NetworkConfig, network | {"decoder": list(network["decoder"])}, str(path))
    return network, about["structures"], from_dict(MaskRule, {n: about[n] for n in ("pixel", "regions")}, str(path))


def read_radiograph(path):
    """Return a radiograph as uint8 (H, W). Raises InputError for an unreadable file or a colour picture."""
    image, header = read_image_and_header(path)
    if header["colour"] > COLOUR_LIMIT:
        raise InputError(f"{path}: a colour picture ({header['colour']:.0%} of its pixels), not a radiograph")
    if header["note"] and header["note"] not in _notes:  # a scanner's files all have the same
        _notes.add(header["note"])
        log.info(f"{path}: {header['note']}; said once")
    return image


class Segmenter:
    """Turn radiographs into masks with one thread per core, each holding a few images, so that memory is bounded.

    structures: names of the network's channels; size: side of its images in pixels; pixel, regions: the decision rule;
    about: the file's metadata. Images are uint8 (H, W) of any size; results are in the order of the images.
    """

    def __init__(self, model, size, structures, rule, views, device, batch_size, wanted, about):
        self.device, self._dtype = device, precision(device, wanted)
        self._model = model.eval().to(device, memory_format=torch.channels_last)
        self._views, self._batch_size, self._kind, self._rule = views, batch_size, structures, rule
        self.structures, self.size, self.about = STRUCTURES[structures], size, about
        self.pixel, self.regions = rule.pixel, rule.regions

    def probs(self, images):
        """Yield probabilities × 255, uint8 (C, size, size), for each image, which is stretched to a square."""
        return self._each_array(images, lambda image, probs: probs)

    def masks(self, images):
        """Yield the mask of each image's lungs, uint8 (H, W) of 0 and 1."""
        return self._each_array(images, lambda image, probs: self.lungs(probs, image.shape))

    def parts(self, probs, shape):
        """Return the mask of each structure by name, uint8 of `shape` (height, width), from one array of `probs`."""
        return dict(zip(self.structures, self._rule.parts(probs, shape, self._kind), strict=True))

    def lungs(self, probs, shape):
        """Return the lungs' mask, uint8 of `shape` (height, width), from one array of `probs`."""
        return self._rule.lungs(probs, shape, self._kind)

    def read(self, files, workers=None):
        """Yield (image id, image, mask, problem) of `files`, id → path; None for both if there is a problem."""
        found = self.each(files, lambda _, image, probs: (image, self.lungs(probs, image.shape)), workers)
        for image_id, both, problem in found:
            yield image_id, *(both or (None, None)), problem

    def each(self, files, finish, workers=None, load=read_radiograph):
        """Yield (image id, finish(image id, image, probs), problem) for each of `files`, a mapping from id to path.

        finish is called in a thread with image uint8 (H, W) and probs uint8 (C, size, size). An unusable file gives
        (image id, None, problem). workers: threads; None: one per core. load(path) -> image.
        """
        return self._run(files.items(), load, finish, workers)

    def _each_array(self, images, finish):
        found = self._run(enumerate(images), _checked, lambda _, image, probs: finish(image, probs), None)
        for _, result, problem in found:
            if problem:
                raise InputError(problem)
            yield result

    def _run(self, items, load, finish, workers):
        # one core per thread: threads that share the work of a layer would wait for each other
        workers, threads = workers or processes.cores(), torch.get_num_threads()
        items = iter(items)
        batches = iter(lambda: list(itertools.islice(items, self._batch_size)), [])
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                waiting = deque()
                for batch in itertools.chain(batches, itertools.repeat(None)):
                    if batch is not None:
                        waiting.append(pool.submit(self._finish_batch, batch, load, finish))
                    if batch is None or len(waiting) > workers:
                        if not waiting:
                            return
                        yield from waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)

    def _finish_batch(self, batch, load, finish):
        loaded = []
        for name, source in batch:
            try:
                loaded.append((name, load(source), ""))
            except InputError as error:
                loaded.append((name, None, str(error)))
        squares = [to_square(image, self.size) for _, image, _ in loaded if image is not None]
        probs = iter(self._predict(np.stack(squares)) if squares else ())
        return [(name, None if said else finish(name, image, next(probs)), said) for name, image, said in loaded]

    @torch.inference_mode()
    def _predict(self, squares):
        images = torch.from_numpy(squares)[:, None].to(self.device)
        with autocast(self.device, self._dtype):
            probs = predict_tta(self._model, images, self._views)
        if not torch.isfinite(probs).all():
            raise InputError("the network produced NaN or infinity; check the weights")
        return (probs * 255 + 0.5).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def _without_norms(model, size):
    """Return a faster copy with batch norms folded into convolutions, or the model if outputs on noise differ."""
    folded, outputs, pairs = copy.deepcopy(model), {}, []

    def note_output(conv, _, output):
        outputs[id(output)] = conv, output  # a reference, so that no other tensor gets its id

    def note_pair(norm, inputs):
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], norm))

    parts = list(folded.modules())
    hooks = [part.register_forward_hook(note_output) for part in parts if isinstance(part, nn.Conv2d)]
    hooks += [part.register_forward_pre_hook(note_pair) for part in parts if isinstance(part, nn.BatchNorm2d)]
    noise = 255 * torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    wanted = folded(noise)
    for hook in hooks:
        hook.remove()
    for conv, norm in pairs:
        own = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *own)
        norm.forward = getattr(norm, "act", nn.Identity()).forward  # timm's norms contain the activation that follows
    return folded if (folded(noise) - wanted).abs().max() < 1e-3 * wanted.std() else model


def _checked(image):
    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8 or image.size == 0:
        raise InputError(f"an image must be uint8 (H, W), not {image.dtype} of shape {image.shape}")
    return image
