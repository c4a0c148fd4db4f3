"""The tools `masks` and `crops`: apply a trained network to any radiographs, without a run."""

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from common import processes
from common.errors import InputError, check, log
from common.extras import require_extra
from common.options import check_device
from common.paths import list_images, make_folder, name_images, remove_leftovers, write_csv
from common.post.boxes import BOX
from common.post.rle import ABSOLUTE, encode
from common.report import page, plots
from common.report.gallery import gallery
from common.train import distributed

from .config import GATE_AREA
from .pairs import READ, write_png
from .postprocess import apply_gate, clean_up, lung_region, scale_box
from .segmenter import load_segmenter

PICTURES = 48  # maximum number in the report, of accepted and of rejected masks each
THUMBNAIL = 384  # longer side in pixels
LONGEST_NAME = 255  # bytes
STARTED = ".started"  # marks the folder of a call that has not ended
FOLDER = {"left": "left lung", "right": "right lung", "heart": "heart"}  # SCR's names, which `run` reads
TABLES = {"masks": "masks.csv", "crops": "boxes.csv"}


def masks(
    images: tuple[Path, ...],
    /,
    *,
    out: Path,
    weights: tuple[Path, ...] = (),
    tta: tuple[Literal["flip", "scale"], ...] = (),
    gate: float = GATE_AREA,
    spread: bool = False,
    most_spread: float = float("inf"),
    clean: bool = False,
    structures: bool = False,
    device: str = "auto",
    onnx_runtime: bool = False,
):
    """Segment the lungs in radiographs: write masks, a table of run-length masks, and a report.

    Writes OUT/<image_id>.png (0 and 255, at the image's original size), masks.csv (area: share of the image; rle:
    Kaggle's absolute run-lengths), problems.csv if a file could not be used, and report.html. Masks with less lung
    than the gate requires are written too, marked as rejected. With --structures, the masks of each structure are in
    OUT/left lung, OUT/right lung (the patient's) and OUT/heart. With --spread, OUT/spread/<image_id>.png shows where
    views and networks disagree (255: a standard deviation of one half), and masks.csv has the spread: the sum of this
    map as a share of the lungs' area.

    Args:
        images: DICOM, PNG or JPEG files, or folders with such files.
        out: Folder for the masks, new, empty or of an earlier call.
        weights: Files written by the verb `export_segmenter`; several are averaged (default: the shipped weights).
        tta: Test-time augmentation: slower, slightly better.
        gate: Minimum share of the image that is lung, after clean-up, for a mask to be accepted (Ahmed et al.).
        spread: Write where views and networks disagree; needs --tta or several --weights.
        most_spread: With --spread, the maximum spread for a mask to be accepted.
        clean: Dilate and close the masks, as Ahmed et al. do before they cut out the lungs.
        structures: Also write the left lung, the right lung and the heart separately.
        device: auto, cpu, cuda or cuda:<n>.
        onnx_runtime: On a CPU, use what is fastest for the first batch: torch, ONNX Runtime, or OpenVINO if installed.
    """
    check(most_spread > 0 and (spread or most_spread == float("inf")), "--most-spread: above 0, and with --spread")
    segmenter, began = _open(weights, device, tta, gate, onnx_runtime, spread), time.monotonic()
    if structures and len(segmenter.structures) == 1:
        named = ", ".join(map(str, weights)) or "the shipped network"
        raise InputError(f"--structures: {named} only segments both lungs together")

    def finish(image_id, image, probs):
        found = probs[-1]
        probs = probs[:-1] if spread else probs
        parts = segmenter.parts(probs, image.shape)
        mask = np.maximum.reduce(list(parts.values())[:2])
        mask = clean_up(mask) if clean else mask
        for name, part in parts.items() if structures else ():
            write_png(out / FOLDER[name] / f"{image_id}.png", part * np.uint8(255))
        write_png(out / f"{image_id}.png", mask * np.uint8(255))
        verdict = apply_gate(clean_up(segmenter.lungs(probs, probs.shape[1:])), gate)  # after clean-up, as in the paper
        row = {"width": image.shape[1], "height": image.shape[0], "area": round(mask.mean(), 5)}
        if spread:
            write_png(out / "spread" / f"{image_id}.png", cv2.resize(found, image.shape[::-1]))
            share = found.sum(dtype=float) / 510 / max(np.count_nonzero(segmenter.lungs(probs, found.shape)), 1)
            row["spread"] = round(share, 5)
            if verdict.ok and share > most_spread:
                verdict = verdict._replace(ok=False, reason=f"spread {share:.3f}, above {most_spread:g}")
        if verdict.ok and not mask.any():  # a tiny image, whose mask is lost when it is scaled down
            verdict = verdict._replace(ok=False, reason="no lung left at the size of the image")
        row |= {"ok": verdict.ok, "reason": verdict.reason, "rle": encode(mask, ABSOLUTE)}
        planes = _small(image, parts.get("heart") if structures else None, mask)
        said = f"{image_id}: {verdict.reason or f'{verdict.area:.0%} lung'}"
        return row, 100 * verdict.area, (*planes, said)

    def report(table, problems, areas, pictures):
        about = {"weights": ", ".join(map(str, weights)) or "as shipped", "tta": tta, "clean": clean, **segmenter.about}
        _write_report(out, table, areas, pictures, gate, problems, about, time.monotonic() - began)

    return _apply(segmenter, images, out, "masks", finish, report)


def crops(
    images: tuple[Path, ...],
    /,
    *,
    out: Path,
    weights: Path | None = None,
    tta: tuple[Literal["flip", "scale"], ...] = (),
    gate: float = GATE_AREA,
    device: str = "auto",
    onnx_runtime: bool = False,
):
    """Crop the lungs from radiographs at the originals' resolution.

    Writes OUT/<image_id>.png (8-bit grey), boxes.csv (in pixels of the original, ends exclusive; rule: how the box was
    found, `whole` for an uncropped image without lungs), and problems.csv if a file could not be used. Prints the share
    of images by rule, as Liu et al. do: two correct regions, false positives removed, one lung mirrored, two on
    one_side, one merged region.

    Args:
        images: DICOM, PNG or JPEG files, or folders with such files.
        out: Folder for the crops, new, empty or of an earlier call.
        weights: File written by the verb `export_segmenter` (default: the shipped weights).
        tta: Test-time augmentation: slower, slightly better.
        gate: Minimum share of the image that is lung, after clean-up, for a crop to be accepted (Ahmed et al.).
        device: auto, cpu, cuda or cuda:<n>.
        onnx_runtime: On a CPU, use what is fastest for the first batch: torch, ONNX Runtime, or OpenVINO if installed.
    """
    segmenter = _open((weights,) if weights else (), device, tta, gate, onnx_runtime)

    def finish(image_id, image, probs):
        mask = segmenter.lungs(probs, probs.shape[1:])
        region, verdict = lung_region(mask), apply_gate(clean_up(mask), gate)
        box = (0, 0, *image.shape[::-1]) if region is None else scale_box(region.box, mask.shape, image.shape)
        x_min, y_min, x_max, y_max = box
        write_png(out / f"{image_id}.png", image[y_min:y_max, x_min:x_max])
        row = {"width": image.shape[1], "height": image.shape[0]} | dict(zip(BOX, box, strict=True))
        row |= {"rule": "whole" if region is None else region.rule, "ok": verdict.ok, "reason": verdict.reason}
        return row, verdict.area, None

    def report(table, *_):
        shares = table["rule"].value_counts(normalize=True)
        log.info(", ".join(f"{rule} {share:.2%}" for rule, share in shares.items()))

    return _apply(segmenter, images, out, "crops", finish, report)


TOOLS = {"masks": masks, "crops": crops}


def _open(weights, device, tta, gate, onnx=False, spread=False):
    check_device(device)
    if onnx:
        require_extra("onnx", "--onnx-runtime")
    check(0 <= gate <= 1, f"--gate must lie in [0, 1], not {gate:g}")
    first, *more = weights or (None,)
    return load_segmenter(first, distributed.start(device), tta, onnx=onnx, more=more, spread=spread)


def _apply(segmenter, images, out, kind, finish, report):
    """Write the table of `kind`, one row per usable image, and problems.csv; return the number of unusable images.

    finish(image id, image, probs) -> (dict of a row without id, area, picture). report(table, (id, problem) pairs,
    areas, the first pictures by verdict) is called last. Under torchrun, each process takes a share of the images; the
    first one gathers the rows and returns the number, the others return 0.
    """
    files, problems = processes.ask_main(lambda: _find(images, out, kind))
    own = dict(list(files.items())[distributed.share(len(files), segmenter.batch_size)])
    quiet, rows, areas, pictures = not processes.is_main(), [], [], {True: [], False: []}
    problems = [] if quiet else problems
    bar = tqdm(segmenter.each(own, finish), "lungs", len(own), unit="image", leave=False, disable=quiet)
    for image_id, result, problem in bar:
        if problem:
            _leave_out(problems, image_id, problem)
            for folder in ("", "spread", *FOLDER.values()):
                (out / folder / f"{image_id}.png").unlink(missing_ok=True)  # from an earlier call
            continue
        rows.append({"image_id": image_id} | result[0])
        areas.append(result[1])
        if len(kept := pictures[result[0]["ok"]]) < PICTURES:
            kept.append(result[2])
    parts = processes.gather((rows, problems, areas, pictures), to_all=False)
    if quiet:
        return 0
    rows, problems, areas = (list(itertools.chain(*each)) for each in list(zip(*parts, strict=True))[:3])
    pictures = {ok: list(itertools.chain(*(part[3][ok] for part in parts)))[:PICTURES] for ok in pictures}
    if problems:
        write_csv(out / "problems.csv", pd.DataFrame(problems, columns=["image_id", "problem"]))
    check(rows, "none of the images could be used")
    table = pd.DataFrame(rows)
    write_csv(out / TABLES[kind], table)
    (out / STARTED).unlink()
    log.info(f"{kind}: {len(rows):,} in {out}, {(~table['ok']).sum():,} rejected; see {TABLES[kind]}")
    report(table, problems, areas, pictures)
    return len(problems)


def _find(images, out, kind):
    """Return the files to read by image id, and (id, problem) pairs of inputs without images."""
    files, problems = {}, []
    for path in images:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise InputError(f"--out {out}: is inside {path}, where its pictures would be read as radiographs")
        here = list_images(path, READ) if path.is_dir() else [path] * path.is_file()
        if not here:
            reason = "contains no image" if path.is_dir() else "no such file or folder"
            _leave_out(problems, path.stem, f"{path}: {reason}")
        for file in here:
            files.setdefault(os.path.realpath(file), file)  # unlike Path.resolve, accepts a loop of links
    root = os.path.commonpath([file.absolute().parent for file in files.values()] or ["/"])
    found = name_images(files.values(), root, READ)
    for image_id, file in list(found.items()):
        if len(os.fsencode(f"{Path(image_id).name}.png")) > LONGEST_NAME:
            _leave_out(problems, image_id, f"{found.pop(image_id)}: the name is too long")
        elif os.path.realpath(file) == os.path.realpath(out / f"{image_id}.png"):
            raise InputError(f"--out {out}: {file} would be overwritten")
    check(found, problems[0][1] if problems else "no images given: name files or folders")
    check(not out.exists() or out.is_dir(), f"{out}: not a folder (--out)")
    for name in TABLES.values():
        if name != TABLES[kind] and (out / name).exists():
            raise InputError(f"--out {out}: contains {name}, whose pictures have the same names; choose another folder")
    known = (TABLES[kind], "problems.csv", STARTED)
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in known):
        raise InputError(f"--out {out}: holds other files; name an empty or a new folder")
    make_folder(out)
    remove_leftovers(out)
    (out / STARTED).touch()
    earlier = [f"{folder}/{image_id}.png" for folder in ("spread", *FOLDER.values()) for image_id in found]
    for name in (TABLES[kind], "problems.csv", "report.html", *earlier):  # of other images, or with other options
        (out / name).unlink(missing_ok=True)
    return found, problems


def _leave_out(problems, image_id, problem):
    tqdm.write(f"left out: {problem}", file=sys.stderr)
    problems.append((image_id, problem))


def _small(image, *masks):
    """Return small copies of an image and of its masks, which may be None."""
    scale = min(1, THUMBNAIL / max(image.shape))
    size = [max(1, round(side * scale)) for side in image.shape[::-1]]
    planes = [image, *(mask if mask is None else mask * np.uint8(255) for mask in masks)]
    small, *found = (p if p is None else cv2.resize(p, size, interpolation=cv2.INTER_AREA) for p in planes)
    return small, *(mask if mask is None else mask >= 128 for mask in found)


def _write_report(out, table, areas, pictures, gate, problems, about, seconds):
    n, rejected, names = len(table), int((~table["ok"]).sum()), ("heart", "lungs")
    small = sum(area < 100 * gate for area in areas)
    cards = [
        ("Masks", n, f"{n / seconds:.1f} per second"),
        ("Rejected", rejected, f"{small} under the area gate of {gate:.0%} of the image"),
        ("Left out", len(problems), "files that could not be used"),
    ]
    sections = [page.cards(cards)]
    if problems:
        left_out = pd.DataFrame(problems, columns=["image", "problem"])
        sections.append(page.section("Left out", page.table(left_out)))
    if rejected:
        text = "Too little lung: a small chest in a large image, no frontal radiograph, or a failure of the network. "
        text += "With --most-spread, also where views and networks disagree. masks.csv has each reason."
        drawn = gallery(pictures[False], f"The first {len(pictures[False])} of {rejected}.", names=names)
        sections.append(page.section("Rejected", text, drawn))
    histogram = plots.histogram({"masks": areas}, "lung after clean-up, % of the image", threshold=100 * gate)
    if rejected < n:
        outlines = gallery(pictures[True], f"The first {len(pictures[True])} of {n - rejected}.", names=names)
        sections.append(page.section("Outlines", outlines))
    sections += [
        page.section("Areas", page.figure(histogram, "Lung as a share of the image; dashed: the gate")),
        page.section("About", page.join("Tables: ", page.link("masks.csv", "masks.csv")), page.key_values(about)),
    ]
    page.write_page(out / "report.html", "Lung masks", str(out), sections)
