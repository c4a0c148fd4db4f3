"""The pictures of the README, from phantoms alone: `python -m benchmarks.pictures runs/demo` after `cxr demo`.

Needs Chromium. Writes docs/images: lungs.png, the shipped network's outlines; report.png and audit.png, the tops of two
pages of the demo.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from common.phantom.radiograph import draw
from common.report.gallery import outline_overlay
from solutions.lung_segmentation import load_segmenter
from tests.browser import screenshot

OUT = Path(__file__).parents[1] / "docs" / "images"
SEEDS = (3, 8, 21, 34)
PAGES = {"report": "lung_segmentation", "audit": "covid19"}
SIZE, COLOURS = (1100, 1180), 160


def write_picture(name, rgb, width):
    """Write an RGB picture, scaled to `width` pixels and to few colours, and return its path."""
    OUT.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    picture = picture.resize((width, round(width * picture.height / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(OUT / f"{name}.png", optimize=True)
    return OUT / f"{name}.png"


def main(demo):
    """Write all pictures from the folder of a finished demo."""
    images = [draw(seed, 768).image for seed in SEEDS]
    masks = load_segmenter().masks(images)
    row = np.hstack([outline_overlay(image, prediction=mask) for image, mask in zip(images, masks, strict=True)])
    written = [write_picture("lungs", row, 900)]
    for name, solution in PAGES.items():
        written.append(write_picture(name, screenshot(Path(demo) / solution / "report.html", *SIZE), 800))
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
