"""Predict probabilities for store rows in constant memory, averaged over models and views."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import processes
from common.data.loaders import eval_loader
from common.errors import InputError, check
from common.infer.tta import IDENTITY, predict_tta, sigmoid
from common.nn.precision import autocast, precision
from common.paths import atomic_path, read_array
from common.train.distributed import join, share

BATCH = 16  # images predicted at once
BLOCK = 64  # maps copied at once


def predict_masks(models, dataset, out_path, channels=1, **how):
    """Write mask probabilities to the file `out_path` and return them like `write_masks`, uint8 (n, h, w).

    models, dataset, how: as in `predict_probs`; dataset.size is (h, w). With several channels, the file is (n,
    channels, h, w). If the activation returns masks and presence (B, 1), the result is (maps, presence float32 (n,)). A
    probability p is stored as p × 255, halves rounded up.
    """
    shape, present = dataset.size if channels == 1 else (channels, *dataset.size), []
    indices = _own_indices(dataset, **how)

    def blocks():
        for probs, *more in _predict_batches(models, dataset, indices, in_bytes=True, **how):
            for part in more:
                present.extend(part[:, 0].tolist())
            found, wanted = tuple(probs.shape[1:]), (channels, *dataset.size)
            check(found == wanted, f"masks {found} from the network: expected {wanted}")
            yield probs.numpy().reshape(-1, *shape)

    if processes.world() == 1:
        masks = write_masks(out_path, (len(dataset), *shape), blocks())
    else:  # each process writes a part, and the main process joins them
        own = Path(out_path).with_name(f"{Path(out_path).stem}.{processes.rank()}{Path(out_path).suffix}")
        write_masks(own, (len(indices), *shape), blocks())
        parts = processes.gather(own)
        processes.ask_main(lambda: write_masks(out_path, (len(dataset), *shape), drain(parts)).shape)  # not the file
        if processes.is_main():  # parts of a killed command with more processes
            for left in own.parent.glob(f"{Path(out_path).stem}.[0-9]*{own.suffix}"):
                left.unlink()
        present = [value for part in processes.gather(present) for value in part]
        masks = read_array(out_path)
    return (masks, np.array(present, np.float32)) if present else masks


def _own_indices(dataset, batch_size=BATCH, **how):
    """Return the indices that this process predicts, in whole batches, so the number of processes has no effect."""
    return range(len(dataset))[share(len(dataset), batch_size)]


def drain(paths):
    """Yield the maps of several files in blocks; delete each file after reading, since disks may lack room for both."""
    for path in paths:
        part = read_array(path)
        for start in range(0, len(part), BLOCK):
            yield part[start : start + BLOCK]
        path.unlink()


def write_masks(out_path, shape, blocks):
    """Write consecutive `blocks` of uint8 images to a file of `shape` (n, …, h, w) and return it like `read_array`.

    A .b2nd file is compressed image by image, a .npy file is not. Raises OSError if the disk is full.
    """
    check(Path(out_path).suffix in (".npy", ".b2nd"), f"{out_path}: mask probabilities go to a .b2nd or .npy file")
    with atomic_path(out_path) as temporary:
        if temporary.suffix == ".b2nd":
            _write_compressed(temporary, shape, blocks)
        else:  # as a plain file: written pages of a memory map would count as this process's memory
            with open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for block in blocks:
                    file.write(np.ascontiguousarray(block))
    return read_array(out_path)


def draw_masks(out_path, n_rows, shape, draw):
    """Write draw(row), uint8 `shape`, of each of n_rows store rows to a file, in threads; else as `write_masks`."""
    with ThreadPoolExecutor(processes.cores()) as pool:
        # in blocks, since masks that wait for the disk would fill the memory
        blocks = (range(start, min(start + BLOCK, n_rows)) for start in range(0, n_rows, BLOCK))
        drawn = (mask for block in blocks for mask in pool.map(draw, block))
        return write_masks(out_path, (n_rows, *shape), tqdm(drawn, "masks", n_rows, leave=False))


def _write_compressed(path, shape, blocks):
    import blosc2  # takes a second

    # with one thread: the order in which several finish would change the file's bytes
    how = {"codec": blosc2.Codec.ZSTD, "clevel": 3, "filters": [blosc2.Filter.NOFILTER], "nthreads": 1}
    parts = {"chunks": (1, *shape[1:]), "blocks": (*[1] * (len(shape) - 2), *shape[-2:])}
    file = blosc2.empty(shape, np.uint8, urlpath=str(path), contiguous=True, mode="w", cparams=how, **parts)
    with ThreadPoolExecutor(1) as writer:  # compresses a block while the next one is predicted
        done, written = 0, writer.submit(int)  # nothing yet
        for block in blocks:
            written.result()
            written = writer.submit(_write_block, file, done, np.ascontiguousarray(block))
            done += len(block)
        written.result()
    check(done == shape[0], f"{path}: {done} maps instead of {shape[0]}")


def _write_block(file, start, block):
    try:
        file[start : start + len(block)] = block
    except RuntimeError:  # the library gives no reason
        raise OSError(errno.EIO, "cannot be written; is the disk full?") from None


def predict_probs(models, dataset, **how):
    """Return probabilities float32 (n, …) of a Dataset of (image uint8 (channels, h, w), store row).

    models: networks or other callables from images (B, channels, h, w) uint8 to logits, kept on the device. how: the
    arguments of `_predict_batches`: test-time views, an activation from a model's output to probabilities of any shape
    (B, …) except maps, which views would move, and a title for the progress bar or False. Under torchrun, processes
    share the work, and all get the result. InputError without rows or models, and naming the row for NaN or infinity.
    """
    check(len(dataset), "no rows to predict")
    found, done, indices = np.empty(0, np.float32), 0, _own_indices(dataset, **how)
    for (probs,) in _predict_batches(models, dataset, indices, **how):
        probs = probs.numpy()
        if not done:  # one array from the start: joining a list would need twice the memory
            found = np.empty((len(indices), *probs.shape[1:]), probs.dtype)
        found[done : done + len(probs)] = probs
        done += len(probs)
    return join(found)


@torch.inference_mode()
def _predict_batches(
    models,
    dataset,
    indices,
    batch_size=BATCH,
    device=None,
    views=(IDENTITY,),
    amp="auto",
    activation=sigmoid,
    workers=0,
    progress="predict",
    in_bytes=False,
):
    """Yield the means over models and views for each batch of these indices, a CPU tensor per output.

    A batch is yielded after the next one has started, so that the device works while results are handled. in_bytes:
    multiply the first output by 255 and round it to uint8, halves up.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, models = precision(device, amp), list(models)
    check(models, "no model to predict with")
    for model in models:
        if isinstance(model, torch.nn.Module):
            model.to(device, memory_format=torch.channels_last).eval()
    loader = eval_loader(dataset, batch_size, workers, indices, pin_memory=device.type == "cuda")
    quiet, pending = not progress or not processes.is_main(), []
    with tqdm(total=len(indices), desc=progress or None, disable=quiet, leave=False) as bar:
        for images, rows in loader:
            images = images.to(device, non_blocking=True)
            with autocast(device, dtype):
                outputs = [predict_tta(model, images, views, activation) for model in models]
            outputs = [output if isinstance(output, tuple) else (output,) for output in outputs]
            means = [sum(parts) / len(models) for parts in zip(*outputs, strict=True)]
            finite = torch.stack([torch.isfinite(mean).flatten(1).all(1) for mean in means]).all(0)
            if in_bytes:
                means[0] = (means[0] * 255 + 0.5).to(torch.uint8)
            copies, done = [part.to("cpu", non_blocking=True) for part in (finite, *means)], None
            if device.type == "cuda":
                done = torch.cuda.Event()
                done.record()
            pending.append((copies, done, rows))
            bar.update(len(images))
            if len(pending) > 1:
                yield _checked(*pending.pop(0))
        yield from (_checked(*each) for each in pending)


def _checked(copies, done, rows):
    """Return the means of a batch after their transfer from the device. Raises InputError for NaN and infinity."""
    if done is not None:
        done.synchronize()
    bad = ~copies[0]
    if bad.any():
        why = "the network produced NaN or infinity; use fp32 or check the weights"
        raise InputError(f"row {int(rows[bad][0])}: {why}")
    return copies[1:]
