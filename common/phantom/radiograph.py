"""Phantom chest radiographs with known lungs, heart and findings.

Anatomy is drawn in film coordinates: u from the midline (positive on the patient's left, the viewer's right), y
downwards, both as shares of the film's width, so that a seed gives the same picture at every size. Only `Scene.at`
converts them to pixels. Grey levels come from attenuation, which adds up along the beam as in a real film.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

CIRCLE = np.stack([np.cos(np.arange(12) * np.pi / 6), np.sin(np.arange(12) * np.pi / 6)], 1)
GRID = 256  # side of the coarse grid on which everything without edges is computed


def smooth_curve(points, closed, steps=8):
    """Return a Catmull-Rom curve through points (n, 2), as points."""
    ends = (points[-1:], points[:2]) if closed else (points[:1], points[-1:])
    padded = np.vstack([ends[0], points, ends[1]])
    a, b, c, d = (padded[k : len(padded) - 3 + k, None] for k in range(4))
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    curve = b + t * (c - a) / 2 + t**2 * (a - 2.5 * b + 2 * c - d / 2) + t**3 * (1.5 * (b - c) + (d - a) / 2)
    return np.vstack([curve.reshape(-1, 2), points[-1:]][: 1 if closed else 2])


def fill(layer, pixels, value=255):
    """Fill a polygon, points (n, 2) in pixels, of a uint8 layer, antialiased and in place; return the layer."""
    return cv2.fillPoly(layer, [np.int32(pixels * 16)], value, cv2.LINE_AA, 4)


def stroke(layer, pixels, width, value):
    """Draw a line into a uint8 layer in place; one thinner than a pixel is drawn fainter instead."""
    width = width * len(layer)
    cv2.polylines(layer, [np.int32(pixels * 16)], False, value * min(width, 1), max(round(width), 1), cv2.LINE_AA, 4)


def blur(mask, radius):
    """Return a uint8 layer or a bool mask, Gaussian-blurred, as float32 in [0, 1]."""
    layer = mask.astype(np.uint8) * np.uint8(255) if mask.dtype == bool else mask
    return cv2.GaussianBlur(layer, (0, 0), radius * len(mask)).astype(np.float32) / np.float32(255)


def enlarge(grid, size):
    """Return a coarse grid resized to (size, size), bilinear, float32."""
    return cv2.resize(np.float32(grid), (size, size), interpolation=cv2.INTER_LINEAR)


def smooth_noise(rng, size, cells=(24, 80, 200)):
    """Return smooth noise (size, size) of about unit standard deviation, float32."""
    layers = (cv2.resize(rng.standard_normal((n, n), np.float32), (GRID, GRID)) for n in cells)
    return enlarge(sum(weight * layer for weight, layer in zip((0.9, 0.45, 0.4), layers, strict=True)), size)


def main_parts(mask, brush):
    """Return a mask without what is thinner than `brush` pixels and without parts under a fifth of the largest."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((brush, brush), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(opened)
    stats[0, 4] = 0
    return (stats[:, 4] >= max(0.2 * stats[:, 4].max(), 1))[labels]


def _outline(u, y):
    return np.array([u, y]).T / 1e3


# A lung goes from its apex along the lateral wall to the costophrenic angle, then over dome, heart and hilum back.
_WALL = _outline(
    [50, 80, 130, 190, 255, 310, 345, 368, 382, 388, 386], [145, 110, 100, 130, 200, 300, 420, 550, 660, 720, 735]
)
_RIGHT = _outline(
    [360, 300, 230, 160, 105, 98, 85, 60, 55, 60, 45], [695, 658, 643, 645, 652, 600, 530, 455, 360, 250, 180]
)
_LEFT = _outline(
    [362, 320, 270, 225, 207, 182, 145, 98, 78, 62, 82, 70, 45],
    [713, 688, 674, 668, 645, 590, 525, 455, 410, 370, 325, 275, 210],
)
_BODY = _outline(
    [85, 85, 120, 260, 420, 520, 570, 620, 640, 520, 485, 465, 452, 445, 440, 445],
    [-300, 0, 35, 55, 85, 170, 380, 800, 1300, 1300, 800, 470, 430, 500, 800, 1300],
)
_BLADE = _outline([420, 330, 300, 345, 365, 400], [140, 130, 200, 420, 430, 270])


class Lungs(NamedTuple):
    """The two lung fields without the heart, named by the patient's side; bool (size, size)."""

    left: np.ndarray
    right: np.ndarray


class Finding(NamedTuple):
    """One finding: name, mask (bool, (size, size)) and its box (x_min, y_min, x_max, y_max), ends open."""

    name: str
    mask: np.ndarray
    box: tuple


class Radiograph(NamedTuple):
    """A phantom: uint8 image (size, size), `Lungs`, the heart's mask (bool) and the list of findings."""

    image: np.ndarray
    lungs: Lungs
    heart: np.ndarray
    findings: list


@dataclass
class Scene:
    """The anatomy that findings draw on; attenuation runs from 0 for air to about 1 for the spine."""

    size: int
    at: Callable  # (points (n, 2), sign of u, smoothing) -> pixels (n, 2)
    outlines: dict  # "left", "right", "heart" -> pixels (n, 2), float
    lungs: dict  # "left", "right" -> bool mask
    heart: np.ndarray
    tissue: np.ndarray  # float32: the attenuation of everything but the vessels
    vessels: np.ndarray  # float32: vessels and lung texture, absent where the lung has collapsed
    findings: list = field(default_factory=list)

    @property
    def both_lungs(self):
        """Mask of both lungs, bool (size, size)."""
        return self.lungs["left"] | self.lungs["right"]

    def blank(self):
        """Return an empty uint8 layer (size, size)."""
        return np.zeros((self.size, self.size), np.uint8)

    def absorb(self, denser, hidden=0):
        """Add attenuation to the tissue, and hide a share of the vessels."""
        self.tissue += denser
        self.vessels *= 1 - hidden

    def add(self, name, mask):
        """Record a finding; `mask` is bool (size, size) and must not be empty."""
        x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
        assert width, f"{name}: nothing drawn"
        self.findings.append(Finding(name, mask, (x, y, x + width, y + height)))


def draw(seed, size=1024, findings=(), patient=None):
    """Return the `Radiograph` of a seed.

    size: pixels, >= 128. findings: functions of common.phantom.findings, drawn in this order. patient: seed of the
    anatomy (default: `seed`), the same for all films of a person. Without findings, a seed gives its normal film.
    """
    patient = seed if patient is None else patient
    film, hardware, grain, *rest = (np.random.default_rng([seed, part]) for part in range(3 + len(findings)))
    scene = _build_scene(size, np.random.default_rng([patient, 99]), film)
    for finding, rng in zip(findings, rest, strict=True):
        finding(scene, rng)
    image = _expose(scene.tissue + scene.vessels, _draw_devices(scene, hardware), film, grain)
    return Radiograph(image, Lungs(scene.lungs["left"], scene.lungs["right"]), scene.heart, scene.findings)


def _gaussian(x, y, centre, radii):
    return np.exp(-(((x - centre[0]) / radii[0]) ** 2) - ((y - centre[1]) / radii[1]) ** 2)


def _sigmoid(x, width):
    return 1 / (1 + np.exp(-x / width))


def _build_scene(size, rng, film):
    """Return the Scene of a person (`rng`) in the pose and at the scale of one film."""
    broad, flare, heart, stout = rng.uniform([0.94, -0.2, 0.95, 0], [1.05, 0.2, 1.25, 0.05])
    breath, tilt, shift = rng.normal(-0.01, 0.03), np.deg2rad(film.normal(0, 2.5)), film.normal(0, 0.018, 2)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]) * film.uniform(0.90, 1.08)

    def at(points, sign=1, smooth=None):
        u, y = np.array(points, np.float64).T
        u = sign * u * broad * (1 + flare * np.clip(y - 0.45, -0.4, 0.3))
        points = np.stack([u, y + breath * np.clip(2 * y - 0.4, 0, 1) - 0.5], 1) @ turn.T + 0.5 + shift
        return size * (points if smooth is None else smooth_curve(points, smooth == "closed"))

    def lung(medial):
        points = np.vstack([_WALL, medial]) + rng.normal(0, 0.004, (len(_WALL) + len(medial), 2))
        points[len(_WALL) + 3 :, 0] *= np.where(points[len(_WALL) + 3 :, 1] > 0.42, heart, 1)
        return points

    def blank():
        return np.zeros((size, size), np.uint8)

    right, left = lung(_RIGHT), lung(_LEFT)
    border = np.vstack([right[-7:-3] * [-1, 1], left[-6:-10:-1], [[0.06, 0.73], [-0.04, 0.71]]])
    outlines = {"right": at(right, -1, "closed"), "left": at(left, 1, "closed"), "heart": at(border, 1, "closed")}
    lungs = {name: fill(blank(), outlines[name]) for name in ("left", "right")}
    aired = blur(cv2.add(lungs["left"], lungs["right"]), 1 / 700)
    torso = _BODY + np.outer([0] * 4 + [0.5] * 8 + [1] * 4, [stout, 0])
    torso[5:12, 0] += rng.uniform(0, 0.06) * np.clip(torso[5:12, 1] - 0.4, 0, 1) / 0.4
    body = blur(fill(blank(), at(np.vstack([torso, torso[::-1] * [-1, 1]]), 1, "closed")), 1 / 400)

    column, row = np.meshgrid(np.arange(GRID) + 0.5, np.arange(GRID) + 0.5)
    x, y = np.linalg.inv(turn) @ (np.stack([column.ravel(), row.ravel()]) / GRID - 0.5 - shift[:, None])
    x, y = np.float32(x.reshape(GRID, GRID) / broad), np.float32(y.reshape(GRID, GRID) + 0.5)
    dry, wet = _draw_soft_tissue(rng, x, y - breath * np.clip(2 * y - 0.4, 0, 1), stout, body, aired)
    bones = _draw_bones(blank(), blank(), at, rng) * (0.4 + 0.6 * aired)
    tissue = (wet + aired * (dry - wet) + bones) * body
    vessels = (_draw_vessels(blank(), at, rng) + np.float32(0.013) * smooth_noise(rng, size)) * aired
    lungs = {name: mask > 127 for name, mask in lungs.items()}
    heart = (fill(blank(), outlines["heart"]) > 127) & ~lungs["left"] & ~lungs["right"]
    return Scene(size, at, outlines, lungs, heart, tissue, vessels)


def _draw_soft_tissue(rng, x, y, stout, body, aired):
    """Return attenuation (size, size) of lung tissue and of everything else; x, y: film coordinates of the grid."""
    small = [cv2.resize(part, (GRID, GRID), interpolation=cv2.INTER_AREA) > 0.5 for part in (body, aired, 1 - aired)]
    depth, air, wall = (cv2.distanceTransform(np.uint8(part), cv2.DIST_L2, 3) / GRID for part in small)
    wet = 0.52 - 0.16 * np.exp(-depth / 0.015) - 0.22 * np.exp(-depth / 0.07) + 0.08 * np.exp(-wall / 0.012)
    wet += 0.26 * _sigmoid(y - 0.60, 0.05) * np.clip((0.50 + stout - np.abs(x)) / 0.08, 0, 1)  # abdomen
    wet += 0.20 * np.exp(-((x / 0.07) ** 4)) + 0.10 * _gaussian(x, y, (0.05, 0.56), (0.14, 0.16))  # mediastinum, heart
    wet -= 0.10 * np.exp(-((x / 0.017) ** 4)) * _sigmoid(0.31 - y, 0.02)  # trachea
    wet -= rng.uniform(0, 0.2) * np.sqrt(_gaussian(x, y, (rng.uniform(0.17, 0.26), 0.76), (0.06, 0.025)))  # stomach
    dry = 0.27 + rng.normal(0.01, 0.03) - 0.11 * (1 - np.exp(-air / 0.05)) + 0.07 * np.exp(-((x / 0.13) ** 2))
    dry += rng.uniform(0.1, 0.4) * np.clip(y - 0.35, 0, 1) + 0.09 * _gaussian(np.abs(x), y, (0.09, 0.40), (0.035, 0.07))
    breast = _gaussian(np.abs(x), y, (0.24, 0.62), (0.18, 0.13)) * _sigmoid(0.73 - y, 0.012)
    breast = breast * max(rng.uniform(-0.14, 0.14), 0)
    return enlarge(dry + breast, len(body)), enlarge(wet + 0.6 * breast, len(body))


def _draw_bones(back, front, at, rng):
    """Return the attenuation (float32) of ribs, whose arcs cross, clavicles, scapulae, humeri and spine."""
    pitch, drop, thick = rng.uniform([0.056, 0.05, 0.018], [0.062, 0.08, 0.023])
    for sign in (-1, 1):
        for i in range(10):
            y0 = 0.125 + pitch * i + rng.normal(0, 0.002)
            y1 = y0 + drop * min(1, 0.4 + 0.15 * i) + 0.007 * i
            edge = np.interp(y1, _WALL[1:, 1], _WALL[1:, 0]) + 0.002
            u, y = [0.03, 0.10, 0.62 * edge, 0.94 * edge, edge], [y0, y0 - 0.014, y0 - 0.006 + 0.004 * i]
            rear = at(np.array([u, [*y, y1 - 0.016, y1 + 0.01]]).T, sign, "open")
            stroke(back, rear, thick, 105)
            stroke(back, rear, 0.74 * thick, 62)  # a bright rim: the cortex is edge-on
            fore = np.outer([1, 0.95, 0.74, 0.45], [edge, 0]) + np.outer([-0.01, 0.04, 0.10, 0.14], [0, 1]) + [0, y1]
            fore = at(fore, sign, "open")
            for k in range(0, len(fore) - 1, 3) if i < 7 else ():
                fade = 1 - 0.9 * k / len(fore)  # into cartilage
                stroke(front, fore[k : k + 4], 1.2 * thick, 78 * fade)
                stroke(front, fore[k : k + 4], 0.95 * thick, 48 * fade)
        lift = rng.normal(0, 0.015)
        collar = at([(0.035, 0.19), (0.12, 0.175), (0.25, 0.12 + lift), (0.38, 0.105 + lift)], sign, "open")
        stroke(back, at([(0.47, 0.18), (0.51, 0.23), (0.545, 0.5), (0.57, 0.8)], sign), 0.045, 60)
        ball = CIRCLE * [0.035, 0.045] + [0.475, 0.17]
        blade = _BLADE + rng.normal(0.02, [0.015, 0.01])
        for points, layer, value in ((blade, front, 30), (ball, back, 75)):
            points = at(points, sign, "closed")
            np.maximum(layer, fill(np.zeros_like(layer), points, value), out=layer)
            stroke(layer, points, 0.005, value + 25)
        stroke(front, collar, 0.026, 140)
        stroke(front, collar, 0.019, 98)
    for y in np.arange(-0.02, 1.0, 0.062):
        half = np.array([[0.030, y], [0.026, y + 0.025], [0.032, y + 0.05]])
        fill(back, at(np.vstack([half, half[::-1] * [-1, 1]])), 75)
        for sign in (-1, 1):
            fill(back, at(CIRCLE * 0.008 + [0.019, y + 0.02], sign), 100)  # pedicles
    return blur(cv2.add(back, front), 1 / 700) * np.float32(0.31)


def _draw_vessels(layer, at, rng):
    """Return the attenuation (float32) of vessels that branch from the hila and thin out."""
    twigs = []
    for sign in (-1, 1):
        angle = np.linspace(-1.5, 1.4, 13) + rng.normal(0, 0.1, 13)
        root, thick, length = rng.uniform([[0.055], [0.006], [0.15]], [[0.085], [0.010], [0.26]], (3, 13))
        start = np.stack([root, 0.40 + 0.05 * angle], 1)
        for level in range(3):
            n = len(angle)
            turn = angle[:, None] + np.cumsum(rng.normal(0, 0.2, (n, 7)) + 0.04 * np.sign(angle)[:, None], axis=1)
            steps = np.stack([np.cos(turn), np.sin(turn)], 2) * length[:, None, None] / 7
            paths = np.concatenate([start[:, None], start[:, None] + np.cumsum(steps, axis=1)], axis=1)
            pixels = at(paths.reshape(-1, 2), sign).reshape(paths.shape)
            twigs += zip(pixels, thick, [150 * 0.62**level] * n, strict=True)
            forks = [0, 1, 3, 4, 6]
            start = paths[:, 1:][:, forks].reshape(-1, 2)
            angle = (turn[:, forks] + rng.choice((-1, 1), (n, 5)) * rng.uniform(0.3, 0.9, (n, 5))).ravel()
            length = (length[:, None] * rng.uniform(0.4, 0.6, (n, 5))).ravel()
            thick = np.repeat(0.55 * thick, 5)
    for path, thick, value in sorted(twigs, key=lambda twig: twig[1]):  # thick vessels are drawn over thin ones
        stroke(layer, path[3:], 0.6 * thick, 0.6 * value)
        stroke(layer, path[:4], thick, value)
    return blur(layer, 1 / 500) * np.float32(0.19)


def _draw_devices(scene, rng):
    """Return a uint8 layer of leads, tubes, lines, a pacemaker, a skin fold and the side marker."""
    layer = scene.blank()
    leads, tube, central, gastric, pacer, fold = rng.random(6) < (0.35, 0.2, 0.2, 0.15, 0.08, 0.15)
    one, two, three, four = rng.choice((-1, 1), 4)

    def line(points, sign, width, value):
        stroke(layer, scene.at(points, sign, "open"), width, value)

    for _ in range(rng.integers(2, 5) if leads else 0):
        (u, y, rise, end), sign = rng.uniform([0.1, 0.2, -0.1, 0.3], [0.36, 0.75, 0.15, 1.1]), rng.choice((-1, 1))
        for radius, value in ((0.014, 50), (0.005, 200)):
            fill(layer, scene.at(CIRCLE * radius + [u, y], sign), value)
        line([(u, y), (0.6 * u + 0.24, y + rise), (0.6, end)], sign, 0.0035, 130)
    if tube:  # chest tube: two walls and a marker line
        path = [(0.55, 0.72), (0.36, 0.60), (0.27, 0.42), (0.15, rng.uniform(0.18, 0.4))]
        for width, value in ((0.014, 70), (0.008, 35), (0.002, 160)):
            line(path, one, width, value)
    if fold:  # as thin as a pleural line, but with vessels on both sides
        line([(0.19, 0.13), (0.28, 0.40), (0.31, 0.75)], two, 0.003, 45)
    if central:
        line([(0.06 * three, 0), (0.07 * three, 0.14), (-0.025, 0.26), (-0.035, rng.uniform(0.36, 0.46))], 1, 0.005, 80)
    if gastric:
        line([(0, -0.1), (0.005, 0.3), (0.02, 0.62), (0.1, 0.78), (0.18, 0.80)], 1, 0.005, 60)
    if pacer:
        fill(layer, scene.at(CIRCLE * [0.05, 0.035] + [0.27, 0.23], four, "closed"), 170)
        line([(0.27, 0.23), (0.14, 0.16), (0, 0.22)], four, 0.005, 130)
        line([(0, 0.22), (-0.045, 0.42), (0, 0.66), (0.10, 0.67)], 1, 0.005, 130)
    side, x, y, scale = rng.random() < 0.4, *(scene.size * rng.uniform([0.04, 0.06, 0.0012], [0.08, 0.14, 0.0018]))
    where = round(x if side else 0.96 * scene.size - x), round(y)
    cv2.putText(layer, "R" if side else "L", where, 0, scale, 255, max(round(2.5 * scale), 1), cv2.LINE_AA)
    return layer


def _expose(attenuation, overlay, film, grain):
    """Return attenuation as grey levels (uint8) after tone curve, noise and collimation."""
    size = len(attenuation)
    attenuation += overlay * np.float32(0.4 / 255) + (overlay > 200) * np.float32(0.5)
    drawn = film.uniform([-0.12, 0.92, 1.0, 1.0, 205, 2], [0.06, 1.12, 1.8, 1.3, 245, 5])
    low, high, gain, bend, white, noise = np.float32(drawn)
    x = np.clip((attenuation - low) / (high - low), 0, 1.6) ** bend
    x = white * (1 - np.exp(-gain * x)) / (1 - np.exp(-gain)) + 4
    x += noise * cv2.GaussianBlur(grain.standard_normal((size, size), np.float32), (0, 0), 0.7)
    if film.random() < 0.3:
        top, left, right = np.int32(size * np.abs(film.normal(0, 0.02, 3)))
        x[:top], x[:, :left], x[:, size - right :] = 3, 3, 3
    return np.clip(x, 0, 255).astype(np.uint8)
