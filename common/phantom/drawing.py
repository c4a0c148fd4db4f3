"""Drawing tools of the phantoms: shapes, blur and noise on square layers; lengths are shares of the width."""

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
