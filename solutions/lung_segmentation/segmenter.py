"""Load a trained network with its decision rule from one file, and turn radiographs of any size into masks.

`find_lungs` does so for all images of a store once, and keeps the results beside it for every run on that store.

segmenter = load_segmenter()                      # the shipped weights
masks = list(segmenter.masks(images))             # uint8 (H, W) of 0 and 1
for image_id, areas, problem in segmenter.each({"a": "a.png", "b": "b.dcm"}, lambda name, image, probs: ...): ...
"""

import copy
import itertools
import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm import tqdm

from common import processes
from common.config import digest, file_hash, from_dict
from common.data.dicom import COLOUR_LIMIT, read_image_and_header
from common.data.store import to_square
from common.errors import InputError, check, log
from common.extras import is_installed
from common.infer.predict import write_masks
from common.infer.tta import predict_tta, views
from common.nn.onnx import Fastest, OnnxSession, OpenVinoSession, to_onnx
from common.nn.precision import autocast, precision
from common.paths import lock_folder, read_array, read_json, read_parquet, write_table
from common.report.gallery import cached_arrays
from common.train import distributed
from common.train.checkpoint import halve, load_weights, save_weights

from .config import STRUCTURES, NetworkConfig
from .models import build_network
from .postprocess import MaskRule

_notes = set()

SHIPPED = Path(__file__).parent / "weights" / "lungs.safetensors"
FORMAT = 1
_NETWORK = ("architecture", "encoder", "decoder", "size")  # the fields of NetworkConfig that shape a network


def save_segmenter(path, model, about):
    """Write a network and everything that its masks depend on as one safetensors file of half-precision weights.

    about: JSON values with `network`, `structures`, `pixel` and `regions`. Raises InputError if one of them is missing
    or a weight exceeds the range of half precision (see `common.train.checkpoint.halve`).
    """
    network = asdict(about["network"]) if is_dataclass(about["network"]) else about["network"]
    about = about | {"format": FORMAT, "network": {name: network[name] for name in _NETWORK if name in network}}
    _read_description(about, path)
    save_weights(path, halve(model.state_dict(), path), **about)


def load_segmenter(
    weights=None, device=None, tta=(), batch_size=4, precision="auto", onnx=False, more=(), spread=False
):
    """Return the Segmenter in a file written by `save_segmenter`; None: the shipped one, whose hash is checked.

    more: files of further networks with the same structures and size, such as other folds', to average. spread: add a
    channel to the probabilities: twice the standard deviation of the lungs' probability over networks and views.
    device: a torch.device or its name; None: a GPU if available. tta: further views to average, of "flip" and "scale".
    batch_size: images per batch of each thread. precision: as in `common.nn.precision.precision`. onnx: on a CPU, use
    ONNX Runtime or (if installed) OpenVINO when it is faster for the first batch. Raises InputError for another kind of
    file and for invalid arguments.

    >>> load_segmenter(device="cpu").structures
    ('left', 'right', 'heart')
    """
    path = SHIPPED if weights is None else Path(weights)
    pinned = path.with_suffix(".sha256")
    if weights is None and not (path.is_file() and pinned.is_file()):
        raise InputError(f"{path}: the shipped weights are missing; name a file with --weights")
    if weights is None and file_hash(path) != pinned.read_text().split()[0]:
        raise InputError(f"{path}: not the weights that were shipped (their SHA-256 differs); fetch the file again")
    check(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
    about = load_weights(path)[1]
    network, structures, rule = _read_description(about, path)
    check(set(tta) <= {"flip", "scale"}, f"tta {tuple(tta)}: choose from flip and scale")
    device, models = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), []
    seen = views(tta, structures != "lungs")
    check(not spread or len(seen) > 1 or more, "the spread needs further views (--tta) or networks (--weights A B)")
    for file in (path, *more):
        own, kind, _ = _read_description(load_weights(file)[1], file)
        same = (own.size, kind) == (network.size, structures)
        check(same, f"{file}: {kind} at {own.size} px, unlike {path} with {structures} at {network.size} px")
        model = build_network(own, len(STRUCTURES[structures]), "none")
        load_weights(file, model)
        model = _without_norms(model.eval(), network.size)
        if onnx and device.type == "cpu":
            example = torch.zeros(1, 1, network.size, network.size, dtype=torch.uint8)
            content, cores = to_onnx(model, example, str(file)), max(1, processes.cores() // processes.count_here())
            further = [OpenVinoSession(content, cores)] if is_installed("openvino") else []
            model = Fastest(model, OnnxSession(content, threads=1), "lung segmenter", *further)
        models.append(model)
    return Segmenter(models, network.size, structures, rule, seen, device, batch_size, precision, about, spread)


def _read_description(about, path):
    """Return the NetworkConfig, the key of STRUCTURES and the MaskRule in a file's metadata."""
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: not a lung segmenter of format {FORMAT}, as written by the verb `export_segmenter`")
    network, structures = about.get("network"), about.get("structures")
    if not isinstance(network, dict) or set(network) != set(_NETWORK):
        raise InputError(f"{path}: describes no network with {', '.join(_NETWORK)}")
    check(str(structures) in STRUCTURES, f"{path}: structures {structures!r} is not one of {', '.join(STRUCTURES)}")
    rule = from_dict(MaskRule, {name: about.get(name) for name in ("pixel", "regions")}, str(path))
    return from_dict(NetworkConfig, json.loads(json.dumps(network)), str(path)), structures, rule


def read_radiograph(path):
    """Return a radiograph as uint8 (H, W). Raises InputError for an unreadable file or a colour picture."""
    image, header = read_image_and_header(path)
    if header["colour"] > COLOUR_LIMIT:
        raise InputError(f"{path}: a colour picture ({header['colour']:.0%} of its pixels), not a radiograph")
    if header["note"] and header["note"] not in _notes:  # all files of a scanner have the same note
        _notes.add(header["note"])
        log.info(f"{path}: {header['note']}; said once")
    return image


class Segmenter:
    """Turn radiographs into masks with one thread per core, each holding a few images, so that memory is bounded.

    structures: names of the network's channels; batch_size: images per thread; size: side of the network's input in
    pixels; pixel, regions: the decision rule; about: the file's metadata. Images are uint8 (H, W) of any size; results
    are in the order of the images.
    """

    def __init__(self, models, size, structures, rule, views, device, batch_size, wanted, about, spread=False):
        self.device, self._dtype, self._spread = device, precision(device, wanted), spread
        self._models = [model.eval().to(device, memory_format=torch.channels_last) for model in models]
        self._views, self.batch_size, self._kind, self._rule = views, batch_size, structures, rule
        self.structures, self.size, self.about = STRUCTURES[structures], size, about
        self.pixel, self.regions = rule.pixel, rule.regions

    def probs(self, images):
        """Yield each image's probabilities × 255, uint8 (C, size, size); images are stretched to a square."""
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

    def _each_array(self, images, finish):
        for _, result, problem in self.each(enumerate(images), lambda _, *found: finish(*found), load=_checked):
            check(not problem, problem)
            yield result

    def each(self, files, finish, workers=None, load=read_radiograph):
        """Yield (image id, finish(image id, image, probs), problem) of each of `files`: id → path, or (id, path) pairs.

        finish is called in a thread with image uint8 (H, W) and probs uint8 (C, size, size). An unusable file gives
        (image id, None, problem). workers: threads, by default one per core of this process; load(path) -> image.
        """
        # one core per thread, since threads that split the work of a layer would wait for each other
        workers, threads = workers or max(1, processes.cores() // processes.count_here()), torch.get_num_threads()
        items = iter(files.items() if isinstance(files, dict) else files)
        batches = iter(lambda: list(itertools.islice(items, self.batch_size)), [])
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                waiting = deque()
                for batch in batches:
                    waiting.append(pool.submit(self._finish_batch, batch, load, finish))
                    if len(waiting) > workers:
                        yield from waiting.popleft().result()
                while waiting:
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
            runs = [(model, [view]) for model in self._models for view in self._views]
            each = torch.stack([predict_tta(model, images, view) for model, view in runs])
        probs = each.mean(0)
        if self._spread:
            lungs = each[:, :, : len(self.structures[:2])].amax(2, keepdim=True)
            probs = torch.cat([probs, 2 * lungs.std(0, correction=0)], 1)
        check(torch.isfinite(probs).all(), "the network produced NaN or infinity; check the weights")
        return (probs * 255 + 0.5).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def _without_norms(model, size):
    """Return a faster copy with batch norms folded into the preceding convolutions, or the model if outputs differ.

    Pairs are found by the order of the layers and verified by comparing outputs on noise.
    """
    folded, noise = copy.deepcopy(model), 255 * torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    wanted = folded(noise)
    layers = [part for part in folded.modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d)]
    for conv, norm in itertools.pairwise(layers):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            own = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *own)
            norm.forward = getattr(norm, "act", nn.Identity()).forward  # timm's norms contain the activation after them
    return folded if (folded(noise) - wanted).abs().max() < 1e-3 * wanted.std() else model


def _checked(image):
    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8 or image.size == 0:
        raise InputError(f"an image must be uint8 (H, W), not {image.dtype} of shape {image.shape}")
    return image


# ---- of all images of a store ---------------------------------------------------------------------------------------

BLOCK = 256  # images between two checkpoints


def weights_file(weights, option):
    """Return the path of a segmenter's weights: a file, or "shipped". Raises InputError naming the option."""
    path = SHIPPED if weights == "shipped" else Path(weights)
    check(path.is_file(), f"{path}: no such file ({option})")
    return path


def structures_of(weights):
    """Return the structures that a segmenter file segments, such as ("left", "right", "heart"); () if unknown."""
    return STRUCTURES.get(load_weights(weights)[1].get("structures"), ())


def find_lungs(job, store, weights, settings, sides, columns, describe, files=None):
    """Return a store's lungs by the segmenter in the file `weights`, as (table, arrays); reuse results found earlier.

    table: image_id, row and `columns`, one row per image; arrays: paths of uint8 .npy files (N, side, side) by name.
    settings: JSON that the results depend on, besides pixels and weights. sides: array name → side in pixels.
    describe(segmenter, image, probs, about) -> (uint8 arrays (side, side) in the order of `sides`, JSON values of
    `columns`), called in a thread; about: the image's row in the store's table. For a placeholder or a colour picture,
    probs is None and image the stored one. files: image id → original, to read instead of the stored image.
    Called by the main process, which sends `describe` to the others, so it must be picklable.
    A killed run loses at most BLOCK images and continues to the same bytes. Raises InputError for a segmenter that
    cannot be used, an original that can no longer be read, and if another process is doing the same work.
    """
    key = digest(read_json(store.folder / "store.json")["key"], {"segmenter": file_hash(weights), **settings})
    folder, images = store.folder.with_name(f"{store.folder.name}-lungs-{key}"), store.table
    arrays = {name: folder / f"{name}.npy" for name in sides}
    if (folder / "lungs.parquet").is_file():
        log.info(f"lungs: up to date in {folder}")
    else:
        _read_description(load_weights(weights)[1], weights)  # refused before the folder is made
        with lock_folder(folder, "finding these lungs"):
            if done := BLOCK * len(list(folder.glob("block-*.npz"))):
                log.info(f"lungs: continuing, {done} of {len(images)} images are done")
            how = (folder, key, store, weights, job.options, sides, describe, files)
            processes.everywhere(partial(_find_share, *how))
            blocks = [folder / f"block-{start}.npz" for start in range(0, len(images), BLOCK)]
            rows = [row for path in blocks for row in json.loads(str(np.load(path)["columns"]))]
            for name, side in sides.items():
                write_masks(arrays[name], (len(images), side, side), (np.load(path)[name] for path in blocks))
            names = images[["image_id", "row"]].reset_index(drop=True)
            table = pd.concat([names, pd.DataFrame(rows, columns=list(columns))], axis=1)
            write_table(folder / "lungs.parquet", table)  # last: it marks the arrays as complete
            for path in blocks:
                path.unlink()
    if any(len(read_array(path)) != len(images) for path in arrays.values()):
        raise InputError(f"{folder}: damaged lungs (array and table disagree); delete the folder and prepare again")
    return read_parquet(folder / "lungs.parquet"), arrays


def _find_share(folder, key, store, weights, options, *how):
    """Segment this process's share of the blocks and write their files, unless an earlier run did."""
    segmenter = load_segmenter(None if weights == SHIPPED else weights, distributed.start(options.device))
    starts = range(0, len(store.table), BLOCK)
    for start in tqdm(starts[distributed.share(len(starts))], "lungs", disable=not processes.is_main()):
        rows = range(start, min(start + BLOCK, len(store.table)))
        cached_arrays(folder / f"block-{start}.npz", key, partial(_find_block, segmenter, options, store, rows, *how))


def _find_block(segmenter, options, store, rows, sides, describe, files):
    """Return the arrays of some store rows by name, and their values of `columns` as JSON."""
    table = store.table
    radiograph = (table["ok"] & ~(table["colour"] > COLOUR_LIMIT)).to_numpy()

    def finish(row, image, probs):
        return describe(segmenter, image, probs, table.iloc[row])

    def stored(row):
        return np.asarray(store.images[row])

    results = {row: finish(row, stored(row), None) for row in rows if not radiograph[row]}
    sources = {row: row if files is None else files[table["image_id"].iloc[row]] for row in rows if radiograph[row]}
    workers = None if options.workers is None else max(options.workers, 1)
    for row, result, problem in segmenter.each(sources, finish, workers, stored if files is None else read_radiograph):
        check(not problem, problem)
        results[row] = result
    planes, values = zip(*(results[row] for row in rows), strict=True)
    stacks = {name: np.stack([arrays[number] for arrays in planes]) for number, name in enumerate(sides)}
    return stacks | {"columns": json.dumps(values)}
