"""Findings all over both lungs that a phantom radiograph is drawn with, in the form of common.phantom_findings."""

import cv2
import numpy as np

from common.phantom import CIRCLE, cloud, fill, soften, stroke


def edema(scene, rng):
    """Draw fluid in both lungs: haze about the hila like a bat's wings, and short lines at the lateral walls."""
    wings, lines = np.zeros((2, scene.size, scene.size), np.uint8)
    across, along = rng.uniform([0.11, 0.14], [0.14, 0.18])
    for sign in (-1, 1):
        fill(wings, scene.at(CIRCLE * [across, along] + [0.14, 0.45], sign, "closed"))
        for y in np.arange(0.50, 0.66, 0.018) + rng.normal(0, 0.003, 9):
            stroke(lines, scene.at([(0.30, y - 0.004), (0.36, y)], sign), 0.004, 255)
    lung = scene.lungs["left"] | scene.lungs["right"]
    haze = np.clip(1.6 * soften(wings, 1 / 30) - 0.3, 0, 1) * soften(lung, 1 / 500)
    scene.tissue += haze * np.clip(0.85 + 0.25 * cloud(rng, scene.size), 0.2, 1.4) * np.float32(rng.uniform(0.2, 0.25))
    scene.tissue += soften(lines * lung, 1 / 900) * np.float32(0.12)
    scene.vessels *= 1 - np.float32(0.7) * haze
    scene.add("edema", ((haze > 0.4) | (lines > 0)) & lung)


def _inflate(scene, depth):
    """Push the diaphragms down by up to `depth`, flattening their domes, and all above them along with it."""
    size = scene.size
    (middle, top), (_, base) = scene.at([(0, 0.15), (0, 0.66)])
    column = np.arange(size, dtype=np.float32)
    half = np.where(column < middle, middle - scene.at([(0.4, 0.66)], -1)[0, 0], scene.at([(0.4, 0.66)])[0, 0] - middle)
    push = depth * size * np.clip(1.1 - ((column - middle) / half) ** 4, 0.1, 1)

    def lower(points):
        """Where points (n, 2) of the scene come to lie."""
        moved = np.interp(points[:, 0], column, push)
        rise = np.interp(points[:, 1], [top, base, size], [0, 1, 0], 0, 0)
        return points + np.stack([0 * moved, moved * rise], 1)

    row, flat = column[:, None], base + push
    above, below = (row - top).clip(0) * push / (flat - top), (size - row) * (size - base) / (size - flat)
    source = np.float32(np.where(row < flat, row - above, size - below))
    across = np.broadcast_to(column, (size, size)).copy()

    def warp(layer):
        if layer.dtype == bool:
            return warp(np.uint8(layer)) > 0
        how = cv2.INTER_LINEAR if layer.dtype == np.float32 else cv2.INTER_NEAREST
        return cv2.remap(layer, across, source, how, borderMode=cv2.BORDER_REPLICATE)

    before, found, scene.findings = scene.at, scene.findings, []
    scene.at = lambda *arguments: lower(before(*arguments))
    scene.outlines = {name: lower(outline) for name, outline in scene.outlines.items()}
    scene.lungs = {side: warp(lung) for side, lung in scene.lungs.items()}
    scene.heart, scene.tissue, scene.vessels = warp(scene.heart), warp(scene.tissue), warp(scene.vessels)
    for finding in found:
        scene.add(finding.name, warp(finding.mask))


def emphysema(scene, rng):
    """Overinflate both lungs: long and dark with few vessels and round holes, on low flat diaphragms."""
    _inflate(scene, rng.uniform(0.06, 0.09))
    lung = scene.lungs["left"] | scene.lungs["right"]
    bullae, walls = np.zeros((2, scene.size, scene.size), np.uint8)
    for sign in (-1, 1):
        for u, y, radius in rng.uniform([0.12, 0.16, 0.02], [0.3, 0.45, 0.05], (rng.integers(2, 5), 3)):
            outline = scene.at(CIRCLE * radius + [u, y], sign, "closed")
            fill(bullae, outline)
            stroke(walls, outline, 0.003, 255)
    aired, holes, walls = soften(lung, 1 / 500), soften(bullae * lung, 1 / 500), soften(walls * lung, 1 / 900)
    scene.tissue -= np.float32(rng.uniform(0.05, 0.08)) * aired + np.float32(0.05) * holes - np.float32(0.04) * walls
    scene.vessels *= (1 - holes) * (1 - np.float32(0.4) * aired)
    scene.add("emphysema", lung)
