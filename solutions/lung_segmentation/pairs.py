"""Find radiographs with their mask files in four layouts, and read masks."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.data.dicom import read_image
from common.data.guard import check_size
from common.data.loaders import UNKNOWN
from common.data.tables import check_path
from common.errors import InputError, check, log
from common.paths import IMAGES, atomic_path, list_images, strip_suffix
from solutions.lung_segmentation.config import STRUCTURES

READ = (*IMAGES, ".img")  # .img: JSRT
MASKS = (".png", ".gif", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

# Collections are recognised by file names alone, regardless of folders and extensions.
NAMES = {
    "Montgomery": re.compile(r"(MCUCXR_\d+)_[01]"),
    "Shenzhen": re.compile(r"(CHNCXR_\d+)_[01]"),
    "JSRT": re.compile(r"(JPC[LN]N\d{3})"),
}
# Words in names of mask folders: leftMask, "right lung", left_lung_png. Left and right are the patient's.
SIDES = {"left", "right"}
MASK_WORDS = {"mask", "masks", "lung", "lungs", "heart", "clavicle", "clavicles", "manual", *SIDES}
FLAT, MOST_LABELS = 5, 16  # pixels; grey levels of a map of several labels
FORMATS = {suffix[1:] for suffix in MASKS}


@dataclass
class Pair:
    """A radiograph and its mask files by structure: lungs, left, right, heart."""

    image_id: str
    dataset: str
    patient_id: str
    image: Path | None = None
    masks: dict = field(default_factory=dict)

    def files_of(self, structures):
        """Return each channel's mask files (lungs may share one, a heart have none), or None without lungs."""
        lungs = self.masks.get("lungs")
        left, right = self.masks.get("left", lungs), self.masks.get("right", lungs)
        if None in (left, right):
            return None
        files = {"lungs": [lungs] if lungs else [left, right], "left": [left], "right": [right]}
        files["heart"] = [self.masks["heart"]] if "heart" in self.masks else []
        return [files[name] for name in STRUCTURES[structures]]


def find_pairs(folder):
    """Return all radiographs under `folder` with their masks, a list of Pair ordered by image id.

    Montgomery, Shenzhen and JSRT with SCR's masks are recognised by file names. If none of them is found, files in
    folders `images` are paired with those of the same stem in folders `masks`, and below the same parent folder if
    several images share a stem. Raises InputError if nothing is found, and for two files of the same image or mask.
    """
    folder, files, own, pairs, strange = Path(folder), [], {}, {}, 0  # files: image id, dataset, patient, name, path
    for path in list_images(folder, {*READ, *MASKS}, _holds_answers):
        stem = _stem(path)
        match = next(((d, m) for d, pattern in NAMES.items() if (m := pattern.match(stem))), None)
        if match:
            files.append((match[1][0], match[0], match[1][1], match[1][0], path))
        elif path.parent.name.lower() == "images" or shown_structure(path.parent.name):
            own.setdefault(stem.removesuffix("_mask"), []).append(path)
    if files and own:
        log.info(f"{folder}: ignored {len(own)} names in images/ and masks/ that belong to no known collection")
    for stem, paths in own.items() if not files else ():
        places = [path.parents[1] for path in paths if not shown_structure(path.parent.name)]
        for path in paths:  # if several images have this stem, the id is the path below `folder`
            above = [place for place in places if path.is_relative_to(place)] if len(places) > 1 else []
            place = max(above, key=lambda place: len(place.parts), default=folder)
            image_id = (place / stem).relative_to(folder).as_posix()
            files.append((image_id, "folder", image_id, stem, path))
    for image_id, dataset, patient, name, path in files:
        rest = _stem(path)[len(name) :]
        shows = shown_structure(path.parent.name) or ("lungs" if rest == "_mask" else "")
        if shows == "clavicle" or rest not in ("", "_mask"):
            strange += shows != "clavicle"
            continue
        pair = pairs.setdefault(image_id, Pair(image_id, dataset, patient))
        before = pair.masks.get(shows) if shows else pair.image
        check(before is None, f"{path}: a second file for {shows or 'the image'} of {image_id}; the first is {before}")
        if shows:
            pair.masks[shows] = path
        elif path.suffix.lower() in READ:
            pair.image = path
    if strange:
        log.info(f"{folder}: ignored {strange} files with a suffix to the name of a known image")
    found = [pair for _, pair in sorted(pairs.items()) if pair.image is not None]
    check(found, f"{folder}: no radiographs of Montgomery, Shenzhen or JSRT, and no images/ with masks/ in it")
    if len(found) < len(pairs):
        alone = min(set(pairs) - {pair.image_id for pair in found})
        log.info(f"{folder}: {len(pairs) - len(found)} masks have no image, such as that of {alone}")
    for pair in found:
        check_path(pair.image_id, str(pair.image))
    return found


def _stem(path):
    return bare_stem(strip_suffix(path.name, {*READ, *MASKS}))


def _holds_answers(folder):
    """Return whether this is the hidden folder of the embedded sample, whose labels must not be read."""
    return folder.name == "hidden" and folder.with_name("sample.json").is_file()


def bare_stem(stem):
    """Return a stem without the suffix that converted raw files keep: JPCLN001 for the file JPCLN001.IMG.png."""
    return stem[:-4] if stem.lower().endswith(".img") else stem


def shown_structure(folder):
    """Return the structure (lungs, left, right, heart, clavicle) that a mask folder's name says, else ""."""
    words = set(re.findall(r"left|right|lungs?|masks?|heart|clavicles?|[a-z]+", folder.lower())) - FORMATS
    sides = words & SIDES
    if not words <= MASK_WORDS or not words & {"mask", "masks", "heart", "clavicle", "clavicles", *SIDES}:
        return ""  # `lungs` alone may be a folder of radiographs
    if words & {"heart", "clavicle", "clavicles"}:
        return "heart" if "heart" in words else "clavicle"
    return sides.pop() if len(sides) == 1 else "lungs"


def read_mask(path, may_be_empty=False):
    """Return the mask in a file, bool (H, W): pixels brighter than half of the brightest value.

    Raises InputError naming the file if it cannot be read, has grey levels other than soft edges, or (unless
    `may_be_empty`) is empty or covers the whole image.
    """
    try:
        with Image.open(path) as image:
            check_size(image.height, image.width)
            image.verify()  # the checksums of a PNG, which reading ignores
        with Image.open(path) as image:
            if lossy := image.format == "JPEG":  # Pillow ignores libjpeg's warnings of damage
                read_image(path)
            pixels = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    except Exception as error:  # damaged files raise many kinds of errors
        raise InputError(f"{path}: the mask cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not pixels.any():
        if may_be_empty:
            return pixels > 0
        raise InputError(f"{path}: an empty mask")
    top = int(pixels.max())
    mask = pixels > top // 2
    if np.count_nonzero((pixels > top / 4) & (pixels <= 3 * top / 4)) > np.count_nonzero(mask) / 4:
        raise InputError(f"{path}: has many grey levels, but a mask must be black and white")
    if not lossy and _has_flat_grey(pixels, top):
        raise InputError(f"{path}: has grey areas, like a map of several labels, but a mask must be black and white")
    check(may_be_empty or not mask.all(), f"{path}: the mask covers the whole image")
    return mask


def _has_flat_grey(pixels, top):
    """Return whether squares of FLAT pixels have one of few grey levels each, unlike edges and noise.

    Soft edges that were enlarged have many levels.
    """
    grey, square = (pixels > top / 16) & (pixels < 15 * top / 16), np.ones((FLAT, FLAT), np.uint8)
    pixels = pixels.astype(np.float32)
    flat = grey & (cv2.erode(pixels, square) == cv2.dilate(pixels, square)) if grey.any() else grey
    return 0 < len(np.unique(pixels[flat])) <= MOST_LABELS


def same_proportions(size, other):
    """Return whether scaling the smaller of two sizes (height, width) brings both its sides within a pixel."""
    (h, w), (height, width) = size, other
    return abs(h * width - w * height) <= np.maximum(h + w, height + width)


def fit_mask(mask, shape, where):
    """Return a mask at the image's (height, width), bool, and whether it was resized; InputError if sides disagree."""
    if mask.shape == tuple(shape):
        return mask, False
    (h, w), (height, width) = mask.shape, shape
    if not same_proportions(mask.shape, shape):
        raise InputError(f"{where}: a mask of {w} × {h} pixels for an image of {width} × {height}")
    grown = cv2.resize(mask.astype(np.uint8) * np.uint8(255), (width, height), interpolation=cv2.INTER_LINEAR)
    return grown >= 128, True


def read_masks(files, shape):
    """Return masks, uint8 (C, height, width) of 0 and 1 or UNKNOWN, and whether any of them was resized to `shape`."""
    channels, resized = [], False
    for parts in files:
        united = np.full(shape, 0 if parts else UNKNOWN, np.uint8)
        for path in parts:
            mask, changed = fit_mask(read_mask(path), shape, path)
            united |= mask.view(np.uint8)
            resized |= changed
        channels.append(united)
    if len(files) > 1 and files[0] == files[1]:
        channels[:2] = split_lungs(channels[0], files[0][0])
    return np.stack(channels), resized


def split_lungs(mask, where):
    """Return the patient's left and right lung from a mask with two lungs side by side, else raise InputError."""
    count, labels, stats, centroids = cv2.connectedComponentsWithStats(mask, connectivity=4)
    across, areas = centroids[:, 0], stats[:, cv2.CC_STAT_AREA]
    large = 1 + np.argsort(-areas[1:], kind="stable")[:2]
    if count < 3 or areas[large[1]] < areas[large[0]] / 10 or np.ptp(across[large]) < mask.shape[1] / 8:
        raise InputError(f"{where}: does not show two separate lungs")
    middle = across[large].mean()
    left = np.isin(labels, [region for region in range(1, count) if across[region] > middle]).view(np.uint8)
    return left, mask - left


def write_png(path, pixels):
    """Write pixels, uint8 (H, W), as a PNG file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", pixels)[1])  # imwrite does not report a full disk
