"""Findings of phantom radiographs: functions `f(scene, rng)` for `common.phantom.draw`.

Each changes the scene's attenuation and records its mask, at a random place apart from earlier ones. Lengths are shares
of the film's width; side is "left" or "right", the patient's; ranges are least and most.
"""

from functools import partial

import cv2
import numpy as np

from common.phantom.radiograph import CIRCLE, blur, fill, main_parts, smooth_noise, stroke

_DIFFUSE = ("edema", "emphysema")  # they cover both lungs, so other findings may overlap them


def _choose_side(rng):
    return ("left", "right")[rng.integers(2)]


def _sign(side):
    return 1 if side == "left" else -1


def _displace_lungs(scene, mask):
    """Turn the part of the lungs under `mask` into an organ of the mediastinum."""
    gained = blur(mask, 1 / 500)
    scene.absorb(0.28 * gained, gained)
    scene.lungs = {side: lung & ~mask for side, lung in scene.lungs.items()}


def pneumothorax(scene, rng, side=None, share=None, darkness=(0.07, 0.11)):
    """Draw air beside a collapsed lung, behind a white pleural line.

    share: of the lung that it fills (default: 1 to 20 %); darkness: range of the attenuation that is missing.
    """
    side = side or _choose_side(rng)
    share = np.exp(rng.uniform(np.log(0.01), np.log(0.20))) if share is None else share
    outline, lung = scene.outlines[side], scene.lungs[side]
    low, high = outline.min(0), outline.max(0)
    rays = outline - [low[0] if side == "left" else high[0], (low[1] + high[1]) / 2]  # the lung recoils to its hilum
    angle = np.arctan2(-rays[:, 1], _sign(side) * rays[:, 0])  # 0 is lateral, pi / 2 the apex
    peak, spread = rng.uniform([0.5, 0.35], [1.3, 0.8])
    if rng.random() < 0.1 and share < 0.06:
        peak, spread = -0.7, 0.3  # air in the costophrenic angle, as in a supine patient
    fast, phase, other = rng.uniform([3, 0, 0], [7, 6, 6])
    waves = 1 + 0.12 * np.sin(fast * angle + phase) + 0.05 * np.sin(13 * angle + other)
    waves *= np.clip((angle + 1.2) * 3, 0, 1)  # the base stays on the diaphragm

    def collapsed(amount):
        return outline - (amount * waves * np.exp(-(((angle - peak) / spread) ** 2)))[:, None] * rays

    def air(amount):
        return lung & (fill(scene.blank(), collapsed(amount)) < 128)

    while air(0.8).sum() < share * lung.sum():
        spread *= 1.2
    least, most = 0.0, 0.8
    for _ in range(9):
        middle = (least + most) / 2
        least, most = (middle, most) if air(middle).sum() < share * lung.sum() else (least, middle)
    mask = main_parts(air(most), max(scene.size // 340, 1))
    soft, pleura = blur(mask, 1 / 900), scene.blank()
    scene.absorb(-rng.uniform(*darkness) * soft, soft)
    scene.absorb(np.float32(0.3 * share) * (lung & ~mask))  # the collapsed lung holds less air
    stroke(pleura, collapsed(most), 0.0022, 255)
    scene.absorb(0.11 * blur(pleura * (cv2.dilate(np.uint8(mask), np.ones((5, 5))) & lung), 1 / 1200))
    scene.add("pneumothorax", mask)


def _measure_distance(scene, rng, squeeze, inset):
    """Return distances (float32) from a random place in a lung, irregular and stretched along y, and that lung."""
    size, lung = scene.size, scene.lungs[_choose_side(rng)]
    free = lung & ~np.any([finding.mask for finding in scene.findings if finding.name not in _DIFFUSE], axis=0)
    free = free if free.any() else lung
    depth = cv2.distanceTransform(free.astype(np.uint8), cv2.DIST_L2, 3) / size
    places = np.argwhere(depth > min(inset, 0.8 * depth.max()))
    y, x = places[int(rng.random() * len(places))] / size
    along = np.arange(size, dtype=np.float32) / size
    reach = np.hypot(along - np.float32(x), (along[:, None] - np.float32(y)) / np.float32(squeeze))
    return reach * (1 + np.float32(0.13) * smooth_noise(rng, size, (8, 16, 30))), lung


def _draw_disc(reach, radius):
    """Return 1 (float32) within a radius and 0 beyond it, with a soft edge as wide as 0.35 of the radius."""
    return np.clip((np.float32(radius) - reach) / np.float32(0.35 * radius) + np.float32(0.5), 0, 1)


def nodule(scene, rng, name="nodule", radius=(0.012, 0.03), density=(0.12, 0.2)):
    """Draw one round soft-edged shadow in a lung; radius and density (attenuation): ranges."""
    extent, squeeze = rng.uniform(*radius), rng.uniform(0.85, 1.2)
    profile = _draw_disc(_measure_distance(scene, rng, squeeze, 1.2 * radius[1])[0], extent)
    scene.absorb(rng.uniform(*density) * profile)
    scene.add(name, profile > 0.5)


mass = partial(nodule, name="mass", radius=(0.04, 0.075))


def consolidation(scene, rng, density=0.17, radius=(0.07, 0.14)):
    """Draw a cloudy patch of lung filled with fluid, which hides its vessels."""
    extent, squeeze = rng.uniform(*radius), rng.uniform(0.8, 1.5)
    reach, lung = _measure_distance(scene, rng, squeeze, 0.05)
    profile = _draw_disc(reach, extent) * blur(lung, 1 / 500)
    scene.absorb(profile * np.clip(0.8 + 0.3 * smooth_noise(rng, scene.size), 0.2, 1.4) * density, 0.7 * profile)
    scene.add("consolidation", (profile > 0.4) & lung)


def pneumonia(scene, rng, side=None):
    """Draw a lobe filled up to its straight fissure, its bronchi still dark."""
    side = side or _choose_side(rng)
    lung, sign, up = scene.lungs[side], _sign(side), -1 if rng.random() < 0.4 else 1
    fissure, slope, reach = rng.uniform([0.40, 0.0, 0.12], [0.44, 0.05, 0.17])

    def between(start, stop):
        start, stop = fissure + up * start, fissure + up * stop
        corners = [(0, start), (0.45, start + slope), (0.45, stop + slope), (0, stop)]
        return fill(scene.blank(), scene.at(corners, sign))

    fading = np.clip(1.2 * blur(between(-0.2, reach), 1 / 35) - 0.1, 0, 1)
    lobe = fading * blur(between(0, 0.5), 1 / 700) * blur(lung, 1 / 700)
    bronchi = scene.blank()
    for angle in up * (rng.uniform(0.1, 0.3) + np.arange(4) * 0.32):
        turn = angle + np.cumsum(rng.normal(0, 0.12, 6))
        path = np.array((0.06, fissure)) + np.cumsum(0.035 * np.stack([np.cos(turn), np.sin(turn)], 1), axis=0)
        stroke(bronchi, scene.at(path, sign, "open"), 0.0045, 200)
    filled = lobe * np.clip(0.95 + 0.15 * smooth_noise(rng, scene.size), 0.2, 1.4) * rng.uniform(0.22, 0.27)
    scene.absorb(filled * (1 - 0.6 * blur(bronchi, 1 / 400)), 0.85 * lobe)
    scene.add("pneumonia", main_parts((lobe > 0.4) & lung, 3))


def effusion(scene, rng):
    """Draw fluid in one costophrenic angle, its surface rising to the wall."""
    side = _choose_side(rng)
    outline, along = scene.outlines[side], np.linspace(0, 1, 40)
    (start, top), (end, bottom) = outline.min(0), outline.max(0)
    surface = bottom - (bottom - top) * (rng.uniform(0.12, 0.35) + 0.22 * along**3)
    start, end = (start, end) if side == "left" else (end, start)
    pool = np.vstack([np.stack([start + (end - start) * along, surface], 1), [[end, scene.size], [start, scene.size]]])
    soft = blur(fill(scene.blank(), pool), 1 / 90)
    mask = main_parts((soft > 0.5) & scene.lungs[side], 3)
    soft *= blur(scene.lungs[side], 1 / 900)
    scene.absorb(0.33 * soft, soft)
    scene.add("effusion", mask)


def cardiomegaly(scene, rng):
    """Enlarge the heart at the expense of the lung masks."""
    outline = scene.outlines["heart"]
    base = np.array([outline[:, 0].mean(), outline[:, 1].max()])
    mask = fill(scene.blank(), base + (outline - base) * rng.uniform([1.35, 1.0], [1.6, 1.12])) > 127
    mask = main_parts(mask & (scene.heart | scene.both_lungs), scene.size // 50)
    _displace_lungs(scene, mask & ~scene.heart)
    scene.heart = scene.heart | mask
    scene.add("cardiomegaly", scene.heart)


def aortic_enlargement(scene, rng):
    """Widen the aortic arch, which bulges into the left lung and shrinks its mask."""
    arch = CIRCLE * rng.uniform([0.065, 0.065], [0.085, 0.085]) + rng.uniform([0.045, 0.33], [0.055, 0.35])
    mask = fill(scene.blank(), scene.at(arch, 1, "closed")) > 127
    scene.absorb(0.05 * blur(mask, 1 / 150))
    _displace_lungs(scene, mask & scene.both_lungs)
    scene.add("aortic_enlargement", mask)


def hernia(scene, rng):
    """Draw a hiatal hernia: stomach above the diaphragm, behind the heart, with air above fluid."""
    (across, along), (u, y) = rng.uniform([0.075, 0.065], [0.1, 0.085]), rng.uniform([0.0, 0.60], [0.06, 0.63])

    def sac(share):
        return fill(scene.blank(), scene.at(share * CIRCLE * [across, along] + [u, y], 1, "closed"))

    mask = sac(1) > 127
    _displace_lungs(scene, mask & scene.both_lungs)
    level = y + along * rng.uniform(-0.1, 0.3)
    above = fill(scene.blank(), scene.at([(u - 0.2, y - 0.2), (u + 0.2, y - 0.2), (u + 0.2, level), (u - 0.2, level)]))
    scene.absorb(0.1 * blur(mask, 1 / 500))
    scene.absorb(-0.38 * blur(cv2.min(sac(0.88), above), 1 / 700))
    scene.add("hernia", mask)


def atelectasis(scene, rng, density=(0.15, 0.2)):
    """Draw an airless straight-edged wedge of lung at the hilum."""
    side, masks = _choose_side(rng), []
    half, length = rng.uniform((0.2, 0.22), (0.3, 0.3))
    for towards in rng.permutation((-0.75, 0.1, 0.85)) + rng.normal(0, 0.08):
        angle = towards + np.linspace(-half, half, 5)
        wedge = np.array((0.09, 0.41)) + length * np.stack([np.cos(angle), -np.sin(angle)], 1)
        pixels = scene.at([(0.09, 0.41), *wedge], _sign(side))
        masks.append(main_parts((fill(scene.blank(), pixels) > 127) & scene.lungs[side], 3))
    mask = max(masks, key=lambda mask: min(mask.mean(), 0.01))  # the first one that the heart does not cover
    soft = blur(mask, 1 / 400)
    scene.absorb(rng.uniform(*density) * soft, 0.8 * soft)
    scene.add("atelectasis", mask)


def infiltration(scene, rng, density=0.16, radius=(0.08, 0.12)):
    """Draw faint patches with normal lung between them."""
    reach, lung = _measure_distance(scene, rng, rng.uniform(0.8, 1.3), 0.06)
    profile = _draw_disc(reach, rng.uniform(*radius)) * blur(lung, 1 / 500)
    scene.absorb(profile * np.clip(0.35 + 0.9 * smooth_noise(rng, scene.size, (40, 60, 110)), 0, 1.3) * density)
    scene.add("infiltration", (profile > 0.4) & lung)


def fibrosis(scene, rng, radius=(0.05, 0.08)):
    """Draw a bundle of coarse scars that point to the hilum."""
    reach, lung = _measure_distance(scene, rng, 1, 0.06)
    centre = np.array(np.unravel_index(reach.argmin(), reach.shape))[::-1]
    along = scene.at([(0.08, 0.42)], 1 if lung is scene.lungs["left"] else -1)[0] - centre
    along = along / np.hypot(*along)
    layer, radius = scene.blank(), rng.uniform(*radius) * scene.size
    for offset in np.linspace(-0.8, 0.8, rng.integers(6, 10)):
        reach, turn = radius * rng.uniform(0.6, 1, 2) * np.sqrt(1 - offset**2), rng.normal(0, 0.08, 5).cumsum()
        steps = np.linspace(-reach[0], reach[1], 5)[:, None] * along
        across = (radius * (offset + turn))[:, None] * [-along[1], along[0]]
        stroke(layer, centre + steps + across, rng.uniform(0.0025, 0.005), 255)
    layer *= lung
    hull = fill(scene.blank(), cv2.convexHull(np.argwhere(layer)[:, ::-1].astype(np.float32))[:, 0]) > 127
    hull &= lung
    scene.absorb(0.2 * blur(layer, 1 / 900) + 0.04 * blur(hull, 1 / 150))
    scene.add("fibrosis", hull)


def pleural_thickening(scene, rng, radius=(0.08, 0.12), depth=(0.022, 0.035)):
    """Draw a dense rim within one lung, at its apex or its lateral wall; radius: of its extent."""
    side = _choose_side(rng)
    lung, place = scene.lungs[side], (0.13, 0.10) if rng.random() < 0.6 else (0.35, rng.uniform(0.35, 0.5))
    x, y = scene.at([place], _sign(side))[0]
    along = np.arange(scene.size, dtype=np.float32)
    away = np.hypot(along - x, along[:, None] - y) / (rng.uniform(*radius) * scene.size)
    inwards = cv2.distanceTransform(lung.astype(np.uint8), cv2.DIST_L2, 5) / scene.size
    mask = main_parts(lung & (inwards < rng.uniform(*depth) * (1 - away**2)), 1)
    scene.absorb(0.26 * blur(mask, 1 / 700))
    scene.add("pleural_thickening", mask)


def edema(scene, rng):
    """Draw fluid in both lungs: bat-wing haze about the hila and short lines at the lateral walls."""
    lung, (wings, lines) = scene.both_lungs, np.zeros((2, scene.size, scene.size), np.uint8)
    across, along = rng.uniform([0.11, 0.14], [0.14, 0.18])
    for sign in (-1, 1):
        fill(wings, scene.at(CIRCLE * [across, along] + [0.14, 0.45], sign, "closed"))
        for y in np.arange(0.50, 0.66, 0.018) + rng.normal(0, 0.003, 9):
            stroke(lines, scene.at([(0.30, y - 0.004), (0.36, y)], sign), 0.004, 255)
    haze = np.clip(1.6 * blur(wings, 1 / 30) - 0.3, 0, 1) * blur(lung, 1 / 500)
    cloudy = np.clip(0.85 + 0.25 * smooth_noise(rng, scene.size), 0.2, 1.4)
    scene.absorb(haze * cloudy * rng.uniform(0.2, 0.25), 0.7 * haze)
    scene.absorb(0.12 * blur(lines * lung, 1 / 900))
    scene.add("edema", ((haze > 0.4) | (lines > 0)) & lung)


def _inflate(scene, depth):
    """Push the diaphragms down by up to `depth`, flatten their domes and stretch everything above them."""
    size = scene.size
    (middle, top), (_, base) = scene.at([(0, 0.15), (0, 0.66)])
    column = np.arange(size, dtype=np.float32)
    half = np.where(column < middle, middle - scene.at([(0.4, 0.66)], -1)[0, 0], scene.at([(0.4, 0.66)])[0, 0] - middle)
    push = depth * size * np.clip(1.1 - ((column - middle) / half) ** 4, 0.1, 1)

    def lower(points):
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
    """Overinflate both lungs: long, dark, with few vessels and round bullae, on low flat diaphragms."""
    _inflate(scene, rng.uniform(0.06, 0.09))
    lung, (bullae, walls) = scene.both_lungs, np.zeros((2, scene.size, scene.size), np.uint8)
    for sign in (-1, 1):
        for u, y, radius in rng.uniform([0.12, 0.16, 0.02], [0.3, 0.45, 0.05], (rng.integers(2, 5), 3)):
            outline = scene.at(CIRCLE * radius + [u, y], sign, "closed")
            fill(bullae, outline)
            stroke(walls, outline, 0.003, 255)
    aired, holes, walls = blur(lung, 1 / 500), blur(bullae * lung, 1 / 500), blur(walls * lung, 1 / 900)
    scene.absorb(-(rng.uniform(0.05, 0.08) * aired + 0.05 * holes - 0.04 * walls))
    scene.vessels *= (1 - holes) * (1 - 0.4 * aired)
    scene.add("emphysema", lung)
