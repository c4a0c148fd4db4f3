"""The tools `masks` and `crops`: apply a trained network to any radiographs, without a run."""

import contextlib
import csv
import logging
import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from common.errors import InputError
from common.extras import require_extra
from common.options import check_device
from common.paths import atomic_path, escape_formula, list_images, name_images, remove_leftovers
from common.post.rle import ABSOLUTE, encode
from common.report import page, plots
from common.report.gallery import gallery

from .config import GATE_AREA
from .pairs import READ, write_png
from .postprocess import apply_gate, clean_up, lung_region, scale_box
from .segmenter import load_segmenter

log = logging.getLogger(__name__)
PICTURES = 48  # in the report, of accepted and of rejected masks each
THUMBNAIL = 384  # longer side in pixels
NAMES = ("heart", "lungs")  # colours of the outlines
LONGEST_NAME = 255  # bytes
FOLDER = {"left": "left lung", "right": "right lung", "heart": "heart"}  # SCR's, which `run` reads


def masks(
    images: tuple[Path, ...],
    /,
    *,
    out: Path,
    weights: Path | None = None,
    tta: tuple[Literal["flip", "scale"], ...] = (),
    gate: float = GATE_AREA,
    clean: bool = False,
    structures: bool = False,
    device: str = "auto",
    onnx_runtime: bool = False,
):
    """Outline the lungs of radiographs: a mask for each, a table of run-lengths, and a report.

    Writes OUT/<image_id>.png (0 and 255, at the image's original size), masks.csv (area: share of the image; rle:
    Kaggle's absolute run-lengths), problems.csv if a file could not be used, and report.html. A mask with less lung
    than the gate requires is written too, but marked as rejected. With --structures, the masks of each structure are in
    OUT/left lung, OUT/right lung (the patient's) and OUT/heart.

    Args:
        images: DICOM, PNG or JPEG files, or folders with such files.
        out: Folder for the masks, outside the folders of the images.
        weights: File written by the verb `export_segmenter` (default: the shipped weights).
        tta: Further views to average: slower, slightly better.
        gate: Lowest share of the image that must be lung, after clean-up, for the mask to be ok (Ahmed et al.).
        clean: Dilate and close the masks, as Ahmed et al. do before they cut out the lungs.
        structures: Write the left lung, the right lung and the heart apart, too.
        device: auto, cpu, cuda or cuda:<n>.
        onnx_runtime: On a CPU, use ONNX Runtime if it is faster than torch for the first batch.
    """
    segmenter = _open(weights, device, tta, gate, onnx_runtime)
    if structures and len(segmenter.structures) == 1:
        raise InputError(f"--structures: {weights or 'the shipped network'} only segments both lungs together")
    files, problems = _find(images, out, other="boxes.csv")
    summary, began = _Summary(len(files)), time.monotonic()

    def finish(image_id, image, probs):
        parts = segmenter.parts(probs, image.shape)
        mask = np.maximum.reduce(list(parts.values())[:2])
        mask = clean_up(mask) if clean else mask
        for name, part in parts.items() if structures else ():
            write_png(out / FOLDER[name] / f"{image_id}.png", part * np.uint8(255))
        verdict = apply_gate(clean_up(segmenter.lungs(probs, probs.shape[1:])), gate)  # after clean-up, as in the paper
        write_png(out / f"{image_id}.png", mask * np.uint8(255))
        row = (*_sizes(image), f"{mask.mean():.5f}", verdict.ok, verdict.reason, encode(mask, ABSOLUTE))
        return row, verdict, _thumbnails(image, mask, parts.get("heart") if structures else None)

    columns = ("image_id", "width", "height", "area", "ok", "reason", "rle")
    with _table(out / "masks.csv", columns) as write:
        for image_id, (row, verdict, pictures) in _each(segmenter, files, finish, out, problems):
            write((image_id, *row))
            summary.add(image_id, verdict, *pictures)
    about = {"weights": str(weights or "as shipped"), "tta": tta, "clean": clean, **segmenter.about}
    _write_report(out, summary, gate, problems, about, time.monotonic() - began)
    _write_problems(out, problems, len(summary.areas))
    log.info(f"{len(summary.areas)} masks in {out}, {summary.rejected} of them under the area gate; see report.html")
    return len(problems)


def crops(
    images: tuple[Path, ...],
    /,
    *,
    out: Path,
    weights: Path | None = None,
    tta: tuple[Literal["flip", "scale"], ...] = (),
    gate: float = GATE_AREA,
    device: str = "auto",
):
    """Cut the lungs out of radiographs, from the originals' own pixels.

    Writes OUT/<image_id>.png (8-bit grey), boxes.csv (in pixels of the original, ends exclusive; rule: how the box was
    found, `whole` for an uncropped image without lungs), and problems.csv if a file could not be used. Says the share
    of images by rule, as Liu et al. do: two correct regions, false positives removed, one lung mirrored, two on
    one_side, one merged region.

    Args:
        images: DICOM, PNG or JPEG files, or folders with such files.
        out: Folder for the crops, outside the folders of the images.
        weights: File written by the verb `export_segmenter` (default: the shipped weights).
        tta: Further views to average: slower, slightly better.
        gate: Lowest share of the image that must be lung, after clean-up, for the crop to be ok (Ahmed et al.).
        device: auto, cpu, cuda or cuda:<n>.
    """
    segmenter = _open(weights, device, tta, gate)
    files, problems = _find(images, out, other="masks.csv")

    def finish(image_id, image, probs):
        mask = segmenter.lungs(probs, probs.shape[1:])
        region, verdict = lung_region(mask), apply_gate(clean_up(mask), gate)
        box = (0, 0, *_sizes(image)) if region is None else scale_box(region.box, mask.shape, image.shape)
        x_min, y_min, x_max, y_max = box
        write_png(out / f"{image_id}.png", image[y_min:y_max, x_min:x_max])
        return (*_sizes(image), *box, "whole" if region is None else region.rule, verdict.ok, verdict.reason)

    done, rejected, rules = 0, 0, Counter()
    columns = ("image_id", "width", "height", "x_min", "y_min", "x_max", "y_max", "rule", "ok", "reason")
    with _table(out / "boxes.csv", columns) as write:
        for image_id, row in _each(segmenter, files, finish, out, problems):
            write((image_id, *row))
            done, rejected = done + 1, rejected + (not row[-2])
            rules[row[-3]] += 1
    _write_problems(out, problems, done)
    log.info(", ".join(f"{rule} {count / done:.2%}" for rule, count in rules.most_common()))
    log.info(f"{done} crops in {out}, {rejected} of them under the area gate; see boxes.csv")
    return len(problems)


TOOLS = {"masks": masks, "crops": crops}

# ---- files ---------------------------------------------------------------------------------------------------------


def _open(weights, device, tta, gate, onnx=False):
    check_device(device)
    if onnx:
        require_extra("onnx", "--onnx-runtime")
    if not 0 <= gate <= 1:
        raise InputError(f"--gate must lie in [0, 1], not {gate:g}")
    return load_segmenter(weights, None if device == "auto" else device, tta, onnx=onnx)


def _find(images, out, other):
    """Return the files to read by image id, and (id, problem) pairs of inputs without images.

    other: table of the other tool, whose pictures have the same names; `out` is refused if it has that table.
    """
    files, problems = {}, []
    for path in images:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise InputError(f"--out {out}: is inside {path}, where its pictures would be read as radiographs")
        here = list_images(path, READ) if path.is_dir() else [path] if path.is_file() else []
        if not here:
            reason = "contains no image" if path.is_dir() else "no such file or folder"
            _leave_out(problems, path.stem, f"{path}: {reason}")
        for file in here:
            files.setdefault(file.resolve(), file)
    found = name_images(
        files.values(), os.path.commonpath([file.absolute().parent for file in files.values()] or ["/"]), READ
    )
    for image_id, file in list(found.items()):
        if len(os.fsencode(f"{Path(image_id).name}.png")) > LONGEST_NAME:
            _leave_out(problems, image_id, f"{file}: the name is too long")
            del found[image_id]
        elif file.resolve() == (out / f"{image_id}.png").resolve():
            raise InputError(f"--out {out}: {file} would be overwritten")
    if not found:
        raise InputError(problems[0][1] if problems else "no images given: name files or folders")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder (--out)")
    if (out / other).exists():
        raise InputError(f"--out {out}: contains {other}, whose pictures have the same names; choose another folder")
    remove_leftovers(out)
    for name in ("masks.csv", "boxes.csv", "problems.csv", "report.html"):  # of an earlier call on other images
        (out / name).unlink(missing_ok=True)
    return found, problems


def _leave_out(problems, image_id, problem):
    tqdm.write(f"left out: {problem}", file=sys.stderr)
    problems.append((image_id, problem))


def _each(segmenter, files, finish, out, problems):
    """Yield (id, result) for each usable file; the others are reported and added to `problems`."""
    found = segmenter.each(files, finish)
    for image_id, result, problem in tqdm(found, "lungs", len(files), unit="image", leave=False):
        if not problem:
            yield image_id, result
            continue
        _leave_out(problems, image_id, problem)
        for folder in ("", *FOLDER.values()):
            (out / folder / f"{image_id}.png").unlink(missing_ok=True)  # of an earlier call


@contextlib.contextmanager
def _table(path, columns):
    """Yield a function that writes rows to the CSV file `path`, which appears once the block ends without error."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        yield lambda row: writer.writerow([escape_formula(value) for value in row])


def _write_problems(out, problems, done):
    if problems:
        with _table(out / "problems.csv", ("image_id", "problem")) as write:
            for row in problems:
                write(row)
    if not done:
        raise InputError("none of the images could be used")


def _sizes(image):
    return image.shape[1], image.shape[0]


# ---- report --------------------------------------------------------------------------------------------------------


class _Summary:
    """What the report needs, in little memory: the area of every mask, and pictures of some."""

    def __init__(self, total):
        self.areas, self.rejected, self.pictures = [], 0, {True: [], False: []}
        self._step = max(total // PICTURES, 1)

    def add(self, image_id, verdict, image, heart, mask):
        """Add a mask; pictures are kept of the first rejected masks, and of accepted ones at regular intervals."""
        chosen = len(self.areas) % self._step == 0 or not verdict.ok
        if chosen and len(self.pictures[verdict.ok]) < PICTURES:
            caption = f"{image_id}: {verdict.reason or f'{verdict.area:.0%} lung'}"
            self.pictures[verdict.ok].append((image, heart, mask, caption))
        self.areas.append(verdict.area)
        self.rejected += not verdict.ok


def _thumbnails(image, mask, heart):
    """Return small copies of an image, the heart's mask (or None) and the lungs' mask."""
    scale = min(1, THUMBNAIL / max(image.shape))
    size = [max(1, round(side * scale)) for side in _sizes(image)]
    small = partial(cv2.resize, dsize=size, interpolation=cv2.INTER_AREA)
    masks = [m if m is None else (small(m * np.uint8(255)) >= 128).view(np.uint8) for m in (heart, mask)]
    return small(image), *masks


def _write_report(out, summary, gate, problems, about, seconds):
    n, rejected, pictures = len(summary.areas), summary.rejected, summary.pictures
    cards = [
        ("Masks", n, f"{n / seconds:.1f} per second"),
        ("Under the area gate", rejected, f"of {gate:.0%} of the image"),
        ("Left out", len(problems), "files that could not be used"),
    ]
    sections = [page.cards(cards)]
    if problems:
        left_out = pd.DataFrame(problems, columns=["image", "problem"])
        sections.append(page.section("Left out", page.table(left_out)))
    if rejected:
        text = "Too little lung: a small chest in a large image, no frontal radiograph, or a failure of the network."
        drawn = gallery(pictures[False], f"The first {len(pictures[False])} of {rejected}.", names=NAMES)
        sections.append(page.section("Under the area gate", text, drawn))
    areas = {"masks": 100 * np.array(summary.areas)}
    histogram = plots.histogram(areas, "lung after clean-up, % of the image", threshold=100 * gate)
    outlines = gallery(pictures[True], f"{len(pictures[True])} of {n - rejected}.", names=NAMES)
    sections += [
        page.section("Outlines", outlines),
        page.section("Areas", page.figure(histogram, "Lung as a share of the image; dashed: the gate")),
        page.section("About", page.join("Tables: ", page.link("masks.csv", "masks.csv")), page.key_values(about)),
    ]
    page.write_page(out / "report.html", "Lung masks", str(out), sections)
