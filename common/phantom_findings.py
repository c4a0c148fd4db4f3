"""Findings that a phantom radiograph is drawn with: functions `f(scene, rng)` for `common.phantom.draw`.

Each changes the scene's attenuation and records its mask. Lengths are shares of the film's width. Where one of several
findings lands is left to chance, away from those that are there already as far as there is room.
"""

from functools import partial

import cv2
import numpy as np

from common.errors import InputError
from common.phantom import CIRCLE, cloud, fill, main_parts, soften, stroke

DIFFUSE = ("edema", "emphysema")  # of common.phantom_diffuse: all over both lungs, so that nothing lies beside them


def _side(scene, rng, side):
    """`side`, or one of the two at random."""
    if side not in (None, *scene.lungs):
        raise InputError(f"phantom: side={side!r} must be left or right, as the patient has them")
    return side or ("left", "right")[rng.integers(2)]


def _take(scene, mask):
    """Let an organ of the mediastinum have its place from the lungs."""
    gained = soften(mask, 1 / 500)
    scene.tissue += gained * np.float32(0.28)
    scene.vessels *= 1 - gained
    scene.lungs = {side: lung & ~mask for side, lung in scene.lungs.items()}


def _blank(scene):
    return np.zeros((scene.size, scene.size), np.uint8)


def pneumothorax(scene, rng, side=None, share=None):
    """Draw air between chest wall and a collapsed lung: dark, without vessels, behind a thin white pleural line.

    side: "left" or "right" (the patient's); share: part of that lung's area, 0.005 to 0.3. Drawn from `rng` where not
    given, the share log-uniform from 1 % to 20 %. Raises InputError on another side or share.
    """
    side = _side(scene, rng, side)
    share = np.exp(rng.uniform(np.log(0.01), np.log(0.20))) if share is None else share
    if not 0.005 <= share <= 0.3:
        raise InputError(f"phantom: share={share!r} of a lung must lie in 0.005 to 0.3")
    outline, lung, sign = scene.outlines[side], scene.lungs[side], 1 if side == "left" else -1
    low, high = outline.min(0), outline.max(0)
    rays = outline - [low[0] if side == "left" else high[0], (low[1] + high[1]) / 2]  # the lung recoils to its hilum
    angle = np.arctan2(-rays[:, 1], sign * rays[:, 0])  # 0 is lateral, pi / 2 the apex
    peak, spread = rng.uniform([0.5, 0.35], [1.3, 0.8])
    if rng.random() < 0.1 and share < 0.06:
        peak, spread = -0.7, 0.3  # air in the costophrenic angle, as in a supine patient
    fast, phase, other = rng.uniform([3, 0, 0], [7, 6, 6])
    waves = 1 + 0.12 * np.sin(fast * angle + phase) + 0.05 * np.sin(13 * angle + other)
    waves *= np.clip((angle + 1.2) * 3, 0, 1)  # the base stays on the diaphragm

    def collapsed(amount):
        reach = np.exp(-(((angle - peak) / spread) ** 2))
        return outline - (amount * waves * reach)[:, None] * rays

    def air(amount):
        return lung & (fill(_blank(scene), collapsed(amount)) < 128)

    while air(0.8).sum() < share * lung.sum():
        spread *= 1.2
    least, most = 0.0, 0.8
    for _ in range(9):
        middle = (least + most) / 2
        least, most = (middle, most) if air(middle).sum() < share * lung.sum() else (least, middle)
    mask = main_parts(air(most), max(scene.size // 340, 1))
    soft = soften(mask, 1 / 900)
    scene.vessels *= 1 - soft
    scene.tissue -= np.float32(rng.uniform(0.07, 0.11)) * soft
    scene.tissue += np.float32(0.3 * share) * (lung & ~mask)  # what is left of the lung holds less air
    pleura = _blank(scene)
    stroke(pleura, collapsed(most), 0.0022, 255)
    scene.tissue += soften(pleura * (cv2.dilate(np.uint8(mask), np.ones((5, 5))) & lung), 1 / 1200) * np.float32(0.11)
    scene.add("pneumothorax", mask)


def _reach(scene, rng, squeeze, inset):
    """Distance (float32) from a random place in one lung, irregular and stretched by `squeeze` along y; that lung."""
    size, lung = scene.size, scene.lungs[_side(scene, rng, None)]
    free = lung & ~np.any([finding.mask for finding in scene.findings if finding.name not in DIFFUSE], axis=0)
    free = free if free.any() else lung
    depth = cv2.distanceTransform(free.astype(np.uint8), cv2.DIST_L2, 3) / size
    places = np.argwhere(depth > min(inset, 0.8 * depth.max()))
    y, x = places[int(rng.random() * len(places))] / size
    along = np.arange(size, dtype=np.float32) / size
    reach = np.hypot(along - np.float32(x), (along[:, None] - np.float32(y)) / np.float32(squeeze))
    reach *= 1 + np.float32(0.13) * cloud(rng, size, (8, 16, 30))
    return reach, lung


def _within(reach, radius, edge=0.35):
    """1 up to a radius, 0 beyond it, over an edge that is a share of it; float32."""
    return np.clip((np.float32(radius) - reach) / np.float32(edge * radius) + np.float32(0.5), 0, 1)


def nodule(scene, rng, name="nodule", radius=(0.012, 0.03), density=(0.12, 0.2)):
    """Draw one round soft-edged shadow in a lung; radius, a share of the width, and density: least and most."""
    extent, squeeze = rng.uniform(*radius), rng.uniform(0.85, 1.2)
    profile = _within(_reach(scene, rng, squeeze, 1.2 * radius[1])[0], extent)
    scene.tissue += profile * np.float32(rng.uniform(*density))
    scene.add(name, profile > 0.5)


mass = partial(nodule, name="mass", radius=(0.04, 0.075))


def consolidation(scene, rng, name="consolidation", density=0.17, radius=(0.07, 0.14)):
    """Draw a cloudy patch of lung filled with fluid, which hides its vessels; radius as in `nodule`."""
    extent, squeeze = rng.uniform(*radius), rng.uniform(0.8, 1.5)
    reach, lung = _reach(scene, rng, squeeze, 0.05)
    profile = _within(reach, extent) * soften(lung, 1 / 500)
    scene.tissue += profile * np.clip(0.8 + 0.3 * cloud(rng, scene.size), 0.2, 1.4) * np.float32(density)
    scene.vessels *= 1 - np.float32(0.7) * profile
    scene.add(name, (profile > 0.4) & lung)


opacity = partial(consolidation, name="opacity", density=0.10, radius=(0.06, 0.12))


def pneumonia(scene, rng, side=None):
    """Draw a lobe filled up to its fissure, which stays straight, but for its bronchi; side: "left" or "right"."""
    side = _side(scene, rng, side)
    lung, sign, up = scene.lungs[side], 1 if side == "left" else -1, -1 if rng.random() < 0.4 else 1
    fissure, slope, reach = rng.uniform([0.40, 0.0, 0.12], [0.44, 0.05, 0.17])

    def between(start, stop):
        start, stop = fissure + up * start, fissure + up * stop
        corners = [(0, start), (0.45, start + slope), (0.45, stop + slope), (0, stop)]
        return fill(_blank(scene), scene.at(corners, sign))

    fading = np.clip(1.2 * soften(between(-0.2, reach), 1 / 35) - 0.1, 0, 1)
    lobe = fading * soften(between(0, 0.5), 1 / 700) * soften(lung, 1 / 700)
    bronchi = _blank(scene)
    for angle in up * (rng.uniform(0.1, 0.3) + np.arange(4) * 0.32):
        turn = angle + np.cumsum(rng.normal(0, 0.12, 6))
        path = np.array((0.06, fissure)) + np.cumsum(0.035 * np.stack([np.cos(turn), np.sin(turn)], 1), axis=0)
        stroke(bronchi, scene.at(path, sign, "open"), 0.0045, 200)
    filled = lobe * np.clip(0.95 + 0.15 * cloud(rng, scene.size), 0.2, 1.4) * np.float32(rng.uniform(0.22, 0.27))
    scene.tissue += filled * (1 - np.float32(0.6) * soften(bronchi, 1 / 400))
    scene.vessels *= 1 - np.float32(0.85) * lobe
    scene.add("pneumonia", main_parts((lobe > 0.4) & lung, 3))


def effusion(scene, rng, side=None):
    """Draw fluid in one costophrenic angle, its surface rising to the wall; side: "left" or "right"."""
    side = _side(scene, rng, side)
    outline, along = scene.outlines[side], np.linspace(0, 1, 40)
    (start, top), (end, bottom) = outline.min(0), outline.max(0)
    surface = bottom - (bottom - top) * (rng.uniform(0.12, 0.35) + 0.22 * along**3)
    start, end = (start, end) if side == "left" else (end, start)
    pool = np.vstack([np.stack([start + (end - start) * along, surface], 1), [[end, scene.size], [start, scene.size]]])
    soft = soften(fill(_blank(scene), pool), 1 / 90)
    mask = main_parts((soft > 0.5) & scene.lungs[side], 3)
    soft *= soften(scene.lungs[side], 1 / 900)
    scene.tissue += soft * np.float32(0.33)
    scene.vessels *= 1 - soft
    scene.add("effusion", mask)


def cardiomegaly(scene, rng):
    """Enlarge the heart; the lung masks give way to it."""
    outline = scene.outlines["heart"]
    base = np.array([outline[:, 0].mean(), outline[:, 1].max()])
    big = base + (outline - base) * rng.uniform([1.35, 1.0], [1.6, 1.12])
    mask = fill(_blank(scene), big) > 127
    mask = main_parts(mask & (scene.heart | scene.lungs["left"] | scene.lungs["right"]), scene.size // 50)
    _take(scene, mask & ~scene.heart)
    scene.heart = scene.heart | mask
    scene.add("cardiomegaly", scene.heart)


def aortic_enlargement(scene, rng):
    """Widen the aortic arch, which bulges into the left lung; its mask gives way."""
    arch = CIRCLE * rng.uniform([0.065, 0.065], [0.085, 0.085]) + rng.uniform([0.045, 0.33], [0.055, 0.35])
    mask = fill(_blank(scene), scene.at(arch, 1, "closed")) > 127
    scene.tissue += soften(mask, 1 / 150) * np.float32(0.05)
    _take(scene, mask & (scene.lungs["left"] | scene.lungs["right"]))
    scene.add("aortic_enlargement", mask)


def hernia(scene, rng):
    """Draw a piece of stomach above the diaphragm and behind the heart, with air above its fluid."""
    (across, along), (u, y) = rng.uniform([0.075, 0.065], [0.1, 0.085]), rng.uniform([0.0, 0.60], [0.06, 0.63])

    def sac(share):
        return fill(_blank(scene), scene.at(share * CIRCLE * [across, along] + [u, y], 1, "closed"))

    mask = sac(1) > 127
    _take(scene, mask & (scene.lungs["left"] | scene.lungs["right"]))
    level = y + along * rng.uniform(-0.1, 0.3)
    above = fill(_blank(scene), scene.at([(u - 0.2, y - 0.2), (u + 0.2, y - 0.2), (u + 0.2, level), (u - 0.2, level)]))
    scene.tissue += np.float32(0.1) * soften(mask, 1 / 500)
    scene.tissue -= np.float32(0.38) * soften(cv2.min(sac(0.88), above), 1 / 700)
    scene.add("hernia", mask)


def atelectasis(scene, rng, side=None, density=(0.15, 0.2)):
    """Draw an airless wedge of lung, its edges straight, from the hilum outwards.

    side: "left" or "right"; density as in `nodule`.
    """
    side = _side(scene, rng, side)
    half, length = rng.uniform((0.2, 0.22), (0.3, 0.3))
    masks = []
    for towards in rng.permutation((-0.75, 0.1, 0.85)) + rng.normal(0, 0.08):
        angle = towards + np.linspace(-half, half, 5)
        wedge = np.array((0.09, 0.41)) + length * np.stack([np.cos(angle), -np.sin(angle)], 1)
        pixels = scene.at([(0.09, 0.41), *wedge], 1 if side == "left" else -1)
        masks.append(main_parts((fill(_blank(scene), pixels) > 127) & scene.lungs[side], 3))
    mask = max(masks, key=lambda mask: min(mask.mean(), 0.01))  # the first that a large heart does not cover
    soft = soften(mask, 1 / 400)
    scene.tissue += soft * np.float32(rng.uniform(*density))
    scene.vessels *= 1 - np.float32(0.8) * soft
    scene.add("atelectasis", mask)


def calcification(scene, rng):
    """Draw a group of flecks as dense as bone in a lung."""
    reach, _ = _reach(scene, rng, 1, 0.03)
    y, x = np.unravel_index(reach.argmin(), reach.shape)
    layer = _blank(scene)
    for k in range(rng.integers(4, 9)):
        at = rng.normal(0, 0.012, 2) if k else 0
        shape = CIRCLE * rng.uniform(0.003, 0.007) * rng.uniform(0.6, 1.2, (12, 1))
        fill(layer, (shape + at) * scene.size + [x, y])
    scene.tissue += soften(layer, 1 / 1500) * np.float32(0.42)
    scene.add("calcification", layer > 127)


def cavity(scene, rng):
    """Draw a thick-walled ring with air within."""
    radius = rng.uniform(0.04, 0.06)
    reach, _ = _reach(scene, rng, rng.uniform(0.85, 1.2), 0.06)
    whole, hollow = _within(reach, radius, 0.15), _within(reach, 0.62 * radius, 0.2)
    scene.tissue += (whole - hollow) * np.float32(0.2) - hollow * np.float32(0.06)
    scene.vessels *= 1 - hollow
    scene.add("cavity", whole > 0.5)


def infiltration(scene, rng, density=0.16, radius=(0.08, 0.12)):
    """Draw faint patches with lung left between them; radius as in `nodule`."""
    reach, lung = _reach(scene, rng, rng.uniform(0.8, 1.3), 0.06)
    profile = _within(reach, rng.uniform(*radius)) * soften(lung, 1 / 500)
    patches = np.clip(0.35 + 0.9 * cloud(rng, scene.size, (40, 60, 110)), 0, 1.3)
    scene.tissue += profile * patches * np.float32(density)
    scene.add("infiltration", (profile > 0.4) & lung)


def ild(scene, rng, side=None):
    """Draw interstitial lung disease, a net of fine lines over the lower parts of a lung; side: "left" or "right"."""
    lung = scene.lungs[_side(scene, rng, side)]
    _, top, _, height = cv2.boundingRect(lung.astype(np.uint8))
    border = top + height * rng.uniform(0.3, 0.5)
    below = np.clip((np.arange(scene.size, dtype=np.float32)[:, None] - border) / (0.08 * scene.size) + 0.5, 0, 1)
    noise = cv2.resize(rng.standard_normal((90, 90), np.float32), lung.shape, interpolation=cv2.INTER_CUBIC)
    net = np.exp(-((noise / np.float32(0.22)) ** 2))  # lines where the noise changes its sign
    scene.tissue += soften(lung, 1 / 700) * below * (np.float32(0.02) + np.float32(0.13) * net)
    scene.add("ild", main_parts(lung & (below > 0.5), 3))


def fibrosis(scene, rng, radius=(0.05, 0.08)):
    """Draw a bundle of coarse scars that point to the hilum; radius as in `nodule`."""
    reach, lung = _reach(scene, rng, 1, 0.06)
    centre = np.array(np.unravel_index(reach.argmin(), reach.shape))[::-1]
    sign = 1 if lung is scene.lungs["left"] else -1
    along = scene.at([(0.08, 0.42)], sign)[0] - centre
    along = along / np.hypot(*along)
    layer, radius = _blank(scene), rng.uniform(*radius) * scene.size
    for offset in np.linspace(-0.8, 0.8, rng.integers(6, 10)):
        reach, turn = radius * rng.uniform(0.6, 1, 2) * np.sqrt(1 - offset**2), rng.normal(0, 0.08, 5).cumsum()
        steps = np.linspace(-reach[0], reach[1], 5)[:, None] * along
        across = (radius * (offset + turn))[:, None] * [-along[1], along[0]]
        stroke(layer, centre + steps + across, rng.uniform(0.0025, 0.005), 255)
    layer *= lung
    hull = fill(_blank(scene), cv2.convexHull(np.argwhere(layer)[:, ::-1].astype(np.float32))[:, 0]) > 127
    hull &= lung
    scene.tissue += soften(layer, 1 / 900) * np.float32(0.2) + soften(hull, 1 / 150) * np.float32(0.04)
    scene.add("fibrosis", hull)


def pleural_thickening(scene, rng, side=None, radius=(0.08, 0.12), depth=(0.022, 0.035)):
    """Draw a dense rim within one lung, at its apex or its lateral wall.

    side: "left" or "right"; radius, of its extent, and depth: least and most, shares of the width.
    """
    side = _side(scene, rng, side)
    lung, sign = scene.lungs[side], 1 if side == "left" else -1
    place = (0.13, 0.10) if rng.random() < 0.6 else (0.35, rng.uniform(0.35, 0.5))
    x, y = scene.at([place], sign)[0]
    along = np.arange(scene.size, dtype=np.float32)
    away = np.hypot(along - x, along[:, None] - y) / (rng.uniform(*radius) * scene.size)
    inwards = cv2.distanceTransform(lung.astype(np.uint8), cv2.DIST_L2, 5) / scene.size
    mask = main_parts(lung & (inwards < rng.uniform(*depth) * (1 - away**2)), 1)
    scene.tissue += soften(mask, 1 / 700) * np.float32(0.26)
    scene.add("pleural_thickening", mask)
