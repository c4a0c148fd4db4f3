import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode

import cv2
import numpy as np
import pytest

from common.report import detection_plots as plots
from common.report.plots import BLUE


def texts(svg):
    """The texts of an SVG, after a strict parse."""
    nodes = ElementTree.fromstring(svg).iter()
    return ["".join(node.itertext()).strip() for node in nodes if node.tag.endswith("}text")]


def widths(svg):
    """Widths of the bars, in points, from the top."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: [^"]*{BLUE}', svg.decode())
    xs = [[float(x) for x in re.findall(r"[ML] ([-\d.]+)", path)] for path in paths]
    return [max(x) - min(x) for x in xs]


def test_pr_curves_are_listed_by_their_ap_with_those_without_points_left_out():
    some, none = np.array([0.1, 0.5, 0.9]), np.array([])
    svg = plots.pr_curves({"low": (some, 1 - some, 0.25), "none": (none, none, 0.0), "high": (some, 1 - some, 0.75)})
    legend = [text for text in texts(svg) if text.startswith(("low", "high", "none"))]
    assert legend == ["high 0.750", "low 0.250"]
    assert {"recall", "precision"} <= set(texts(svg)) and b"var(--ink, " in svg
    assert plots.pr_curves({}) is None and plots.pr_curves({"none": (none, none, 0.0)}) is None


def test_more_classes_than_colours_each_have_a_line():
    some = np.array([0.1, 0.9])
    svg = plots.pr_curves({f"class {k}": (some, some, k / 20) for k in range(15)})
    assert sum(text.startswith("class ") for text in texts(svg)) == 15


def test_bars_are_as_long_as_their_numbers():
    svg = plots.bars(["one", "three"], [1, 3.0], "count")
    assert {"one", "three", "count", "1", "3"} <= set(texts(svg))
    one, three = widths(svg)
    assert three == pytest.approx(3 * one, rel=1e-3)


def test_location_maps_are_bright_where_the_boxes_lie():
    svg = plots.location_maps({"left": np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 1]]), "none": np.zeros((0, 4))}, cells=4)
    assert any(text.startswith("left") for text in texts(svg)) and not any("none" in text for text in texts(svg))
    picture = b64decode(re.search(r'base64,\s*([^"]+)"', svg.decode())[1])
    grey = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_GRAYSCALE).astype(int)
    if "matrix(1 0 0 -1" in svg.decode() or "scale(1 -1)" in svg.decode():
        grey = grey[::-1]
    height, width = grey.shape
    quarters = [grey[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert quarters[1] == quarters[3] < quarters[2] < quarters[0]  # none, none, one box, two boxes
    assert plots.location_maps({}) is None and plots.location_maps({"a": []}) is None
