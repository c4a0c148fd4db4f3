"""Conversion of stored values to 8-bit grey, and properties of the pixels."""

import hashlib
import logging
import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from common.jit import compiled

FEW_LEVELS = 4  # a mapping that leaves fewer grey levels is unusable
_COLOUR_GRID = 128  # sampled pixels per side
_COLOUR_STEP = 12  # of 255: JPEG distorts the colours of a tinted image by less
_quiet_lock = threading.RLock()


def to_uint8(pixels, bits_stored=None, inverted=False, dataset=None):
    """Map stored values to 8 bits by the convention of `common.data.dicom.read_image`.

    pixels: (H, W) integers of 8 or 16 bits. bits_stored: number of bits used, None for all. inverted: True for
    MONOCHROME1. dataset: the pydicom Dataset with the window, rescale, tables or padding, or None. Returns uint8
    (H, W) and a note about ignored mappings, mostly empty: a mapping is ignored if it cannot be applied or leaves fewer
    than FEW_LEVELS grey levels. Raises ValueError if even the unmapped values leave fewer.
    """
    pixels = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))
    padding, problems = None, []
    if dataset is not None:
        with silence_pydicom():
            _drop_unusable(dataset, problems)
            ends = [dataset.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
            ends = sorted(value for value in ends if isinstance(value, int))
            padding = (ends[0], ends[-1]) if ends else None  # values of pixels outside the image
            for name, mapping in _list_mappings(dataset):
                try:
                    image = _stretch(pixels, inverted, padding, mapping)
                except Exception as error:  # pydicom raises many kinds for malformed elements
                    problems.append(f"{name}: {' '.join(str(error).split())[:80]}")
                    continue
                if _keeps_levels(image, pixels, name, problems):
                    return image, _describe(problems)
    used, unsigned = bits_stored or pixels.itemsize * 8, pixels.dtype.kind == "u"
    if used == 8 and unsigned and (pixels.itemsize == 1 or pixels.max() <= 255):
        image = 255 - pixels.astype(np.uint8) if inverted else np.require(pixels, np.uint8, ["C", "W"])
        return image, _describe(problems)
    image = _stretch(pixels, inverted, padding)
    if not _keeps_levels(image, pixels, f"bits above the {used} used", problems):
        image = _stretch(pixels & ((1 << used) - 1) if unsigned else pixels, inverted, padding)
        if not _keeps_levels(image, pixels, "", []):
            raise ValueError("a few extreme values leave hardly any grey levels")
    return image, _describe(problems)


def _keeps_levels(image, pixels, name, problems):
    """Return whether a mapping left enough grey levels; if not, add a line to `problems`."""
    levels = _count_levels(image)
    if levels >= FEW_LEVELS or _count_levels(pixels) < 2 * FEW_LEVELS:
        return True
    problems.append(f"{name}: leaves {levels} grey levels")
    return False


def _describe(problems):
    return f"unusable elements were ignored ({'; '.join(problems)})" if problems else ""


def _count_levels(image):
    """Return the number of different values among some 16,000 evenly spaced pixels."""
    step = max(1, min(image.shape) // 128)
    return len(np.unique(image[::step, ::step]))


def _drop_unusable(dataset, problems):
    """Remove elements that pydicom cannot handle: half a rescaling, or an unknown function, noted in `problems`."""
    if dataset.get("RescaleSlope") is None or dataset.get("RescaleIntercept") is None:
        for keyword in ("RescaleSlope", "RescaleIntercept"):
            dataset.pop(keyword, None)  # pydicom would multiply by the None of an empty element
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        problems.append(f"VOILUTFunction: {function[:20]!r}")
        function = "LINEAR"
    dataset.VOILUTFunction = function


def _list_mappings(dataset):
    """Yield (name, function of stored values) pairs, the best mapping first; none for a missing mapping."""
    rescaled = (dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)) != (1, 0)
    windowed = dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None
    if windowed or dataset.get("VOILUTSequence"):
        yield "window", lambda stored: apply_voi_lut(apply_modality_lut(stored, dataset), dataset)
    if rescaled or dataset.get("ModalityLUTSequence"):
        yield "rescaling", lambda stored: apply_modality_lut(stored, dataset)


def _stretch(pixels, inverted, padding, mapping=None):
    """Return pixels, mapped and stretched to 0..255; padding is ignored in the minimum and maximum."""
    low, high = int(pixels.min()), int(pixels.max())
    flat = pixels.reshape(-1)
    # the result depends only on the stored value, so it is computed once per value instead of once per pixel
    stored = np.arange(low, high + 1).astype(pixels.dtype)
    mapped = (stored if mapping is None else mapping(stored)).astype(np.float64)
    kept = _find_values(flat, low, len(stored))
    if padding:
        others = kept & ((stored < padding[0]) | (stored > padding[1]))
        kept = others if others.any() else kept
    if inverted:
        mapped = mapped[kept].max() - mapped
    mapped -= mapped[kept].min()
    span = mapped[kept].max()
    table = np.trunc(np.clip(mapped / span, 0, 1) * 255).astype(np.uint8) if span > 0 else np.zeros(len(mapped), "u1")
    return _look_up(table, low, flat).reshape(pixels.shape)


@compiled
def _find_values(pixels, low, n):
    """Return whether each of the values low … low + n - 1 occurs, bool (n,)."""
    found = np.zeros(n, np.bool_)
    for value in pixels:
        found[np.int64(value) - low] = True
    return found


@compiled
def _look_up(table, low, pixels):
    out = np.empty(pixels.size, np.uint8)
    for i in range(pixels.size):
        out[i] = table[np.int64(pixels[i]) - low]
    return out


def colour_share(image, bits_stored=None):
    """Return the share (0 to 1) of pixels whose colour cannot be explained by a tint of the whole image.

    image: (H, W), for which the share is 0, or (H, W, 3 or 4), unsigned 8 or 16 bits, RGB or BGR; alpha is ignored.
    bits_stored: number of bits used, None for all. With a tint, each lightness has one colour. A pixel is therefore
    counted if its R - G or B - G differs by more than 12 of 255 from the median over the pixels of similar lightness.
    At most 128 × 128 evenly spaced pixels are sampled.
    """
    if image.ndim == 2:
        return 0.0
    step = -(-max(image.shape[:2]) // _COLOUR_GRID)
    sample = image[::step, ::step, :3].reshape(-1, 3).T.astype(np.int32)
    first, green, last = (sample >> max((bits_stored or image.itemsize * 8) - 8, 0)).clip(0, 255)
    lightness = (first + green + last) >> 3  # 96 levels; within a level, even a one-channel tint varies by at most 8
    counts = np.bincount(lightness, minlength=96)
    middle = counts.cumsum() - counts // 2 - 1  # position of each level's median among the sorted pixels
    coloured = np.zeros(len(lightness), bool)
    for channel in (first, last):
        difference = channel - green + 256
        pixels = np.sort((lightness << 9 | difference).astype(np.uint16))
        median = pixels[middle].astype(np.int32) & 511
        coloured |= np.abs(difference - median[lightness]) > _COLOUR_STEP
    return float(coloured.mean())


def hash_pixels(image):
    """Return a hash of the size and pixels of a grey image, uint8 (H, W), as 16 hexadecimal digits."""
    return hashlib.blake2b(image.tobytes() + repr(image.shape).encode(), digest_size=8).hexdigest()


@contextmanager
def silence_pydicom():
    """Silence pydicom, which warns about every small violation of the standard in real files.

    Its settings are restored at the end; the lock prevents threads from restoring each other's.
    """
    logger = logging.getLogger("pydicom")
    with _quiet_lock, warnings.catch_warnings(action="ignore"), pydicom.config.disable_value_validation():
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)
