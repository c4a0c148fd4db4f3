"""The embedded sample: phantom radiographs in the layouts of Montgomery, Shenzhen and JSRT with SCR, in one folder.

Like the real sets: Montgomery's films are portrait or landscape, with one mask per lung; Shenzhen's sizes vary, one
mask has both lungs; some images have no mask; JSRT is raw and inverted. Unlike them: Montgomery and Shenzhen are scaled
to 15 %, JSRT is enlarged from 1024 pixels, and clinical readings and clavicles are missing.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from common import phantom
from common.phantom.findings import consolidation, effusion, mass, nodule, pneumothorax
from common.phantom.sample import crop, in_threads, write_sample

VERSION = 1  # raise it whenever the files for a seed change
ABNORMAL = 0.45  # share of abnormal images of Montgomery and Shenzhen
NODULES = 154 / 247  # share of JSRT's images with a nodule
UNLABELLED = 1 / 4  # Montgomery's share of the images without a mask; 17 of 62 in the real data
MONTGOMERY, SHENZHEN = Path("Montgomery/MontgomerySet"), Path("ChinaSet_AllFiles/ChinaSet_AllFiles")
JSRT = Path("JSRT")
LONG, SHORT = 734, 603  # Montgomery's sides, in reality 4892 and 4020
LEAST, MOST = 425, 450  # range of Shenzhen's sides, in reality about 3000
RAW, OUTLINES = 2048, 1024  # sides of JSRT's images and SCR's masks
FINDINGS = (effusion, pneumothorax, consolidation, mass)


def make_sample(folder, n_montgomery=16, n_shenzhen=40, n_jsrt=6, n_test=8, seed=0):
    """Write the sample into `folder` and return it as a Path; a complete sample of the same parameters is kept.

    n_montgomery, n_shenzhen, n_jsrt: images with masks (8 MiB each for JSRT); n_test: Montgomery's and Shenzhen's
    images without a mask; their true masks (both lungs, 0 or 255) are hidden/<image_id>.png.
    """
    counts = {"n_montgomery": n_montgomery, "n_shenzhen": n_shenzhen, "n_jsrt": n_jsrt, "n_test": n_test}
    least = {"n_montgomery": 1, "n_shenzhen": 1, "n_jsrt": 0, "n_test": 1, "seed": 0}
    return write_sample(folder, "lung_segmentation", VERSION, _write, least, **counts, seed=seed)


def _write(folder, n_montgomery, n_shenzhen, n_jsrt, n_test, seed):
    there = int(UNLABELLED * n_test)
    cases = _chests("MCUCXR", n_montgomery, there, seed) + _chests("CHNCXR", n_shenzhen, n_test - there, seed)
    in_threads(partial(_write_case, folder), cases + _nodules(n_jsrt, seed))


class _Case(NamedTuple):
    image_id: str
    number: int  # seed of the phantom
    findings: tuple
    labelled: bool = True


def _chests(prefix, n_labelled, n_unlabelled, seed):
    """Return the cases of Montgomery or Shenzhen, healthy chests first; those without a mask at random positions."""
    first = 1_000_000 * seed + {"MCUCXR": 0, "CHNCXR": 200_000}[prefix]
    rng, count = np.random.default_rng([first, 1]), n_labelled + n_unlabelled
    unlabelled = set(rng.choice(count, n_unlabelled, replace=False).tolist())
    ill = [i >= round((1 - ABNORMAL) * count) for i in range(count)]
    kinds = rng.permutation(np.arange(count) % len(FINDINGS))
    return [
        _Case(f"{prefix}_{i + 1:04d}_{ill[i]:d}", first + i, (FINDINGS[kinds[i]],) * ill[i], i not in unlabelled)
        for i in range(count)
    ]


def _nodules(count, seed):
    """Return the cases of JSRT; those with a nodule (JPCLN) and those without (JPCNN) are numbered separately."""
    first, sick = 1_000_000 * seed + 400_000, round(NODULES * count)
    nodules = [_Case(f"JPCLN{i + 1:03d}", first + i, (nodule,)) for i in range(sick)]
    return nodules + [_Case(f"JPCNN{i + 1 - sick:03d}", first + i, ()) for i in range(sick, count)]


def _write_case(folder, case):
    """Draw and write one film with its masks."""
    if case.image_id.startswith("JP"):
        return _write_jsrt(folder / JSRT, case)
    montgomery, name = case.image_id.startswith("MCU"), f"{case.image_id}.png"
    film = phantom.draw(case.number, LONG if montgomery else MOST, case.findings)
    window = _window(film.lungs.left | film.lungs.right, case.number, montgomery)
    left, right = (lung[window] for lung in film.lungs)
    _save(folder / (MONTGOMERY if montgomery else SHENZHEN) / "CXR_png" / name, film.image[window])
    if not case.labelled:
        _save(folder / "hidden" / name, left | right)
    elif montgomery:
        _save(folder / MONTGOMERY / "ManualMask" / "leftMask" / name, left)
        _save(folder / MONTGOMERY / "ManualMask" / "rightMask" / name, right)
    else:
        _save(folder / "mask" / "mask" / f"{case.image_id}_mask.png", left | right)


def _write_jsrt(folder, case):
    film = phantom.draw(case.number, OUTLINES, case.findings)
    shown = cv2.resize(np.float32(film.image), (RAW, RAW), interpolation=cv2.INTER_CUBIC)
    stored = 4095 - np.clip(np.rint(shown * np.float32(4095 / 255)), 0, 4095)
    path = folder / "All247images" / f"{case.image_id}.IMG"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.astype(">u2").tofile(path)
    masks = folder / "scratch" / ("fold1" if int(case.image_id[-3:]) % 2 else "fold2") / "masks"
    for name, mask in {"left lung": film.lungs.left, "right lung": film.lungs.right, "heart": film.heart}.items():
        _save(masks / name / f"{case.image_id}.gif", mask)


def _window(lungs, number, montgomery):
    """Return the slices that crop a film, with the lungs as central as the film allows."""
    x, y, wide, high = cv2.boundingRect(np.uint8(lungs))
    if montgomery:  # portrait if the lungs are narrow enough for it
        sides = (LONG, SHORT) if wide < 0.9 * SHORT else (SHORT, LONG)
    else:
        sides = np.random.default_rng([number, 2]).integers(LEAST, MOST, 2, endpoint=True).tolist()
    return crop((y + (high - sides[0]) // 2, x + (wide - sides[1]) // 2), sides, len(lungs))


def _save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image * np.uint8(255) if image.dtype == bool else image).save(path)
