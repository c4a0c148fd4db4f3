import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pandas as pd
import pytest

from common.report import plots
from common.report.gallery import gallery
from common.report.page import (
    Html,
    as_text,
    cards,
    details,
    figure,
    grid,
    interval_text,
    join,
    key_values,
    note,
    range_text,
    section,
    table,
    write_page,
)
from tests import browser

EVIL = "</td><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "input"}


class _Reader(HTMLParser):
    """Collects tags, attributes and text, and fails on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _png(shape=(8, 8, 3)):
    return cv2.imencode(".png", np.full(shape, 90, np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    rng = np.random.default_rng(0)
    history = pd.DataFrame({"epoch": range(6), "lr": 1e-4, "train_loss": np.linspace(1, 0.3, 6), EVIL: 0.5})
    mask = np.zeros((64, 64), bool)
    mask[20:40, 10:30] = True
    picture = rng.integers(0, 255, (64, 64), dtype=np.uint8)
    rows = pd.DataFrame(
        {"image_id": ["1.2.276.0.7230010.3.1.4.8323329.2952.1517875175.464531", EVIL], "dice": [0.5, np.nan]}
    )
    drawn = [
        figure(plots.learning_curves(history), f"Curves of {EVIL}"),
        figure(plots.histogram({"a": [1, 2]}, "x"), "ROC"),
    ]
    parts = [
        cards([("Dice", 0.84123, "95 % interval"), (EVIL, EVIL, EVIL)]),
        note("Scores on synthetic data", "warning"),
        section("Training & more", EVIL, grid(*drawn), details("Folded", table(rows, EVIL))),
        section("Pictures", gallery([(picture, mask, None, EVIL), (picture, mask, mask, "b")], "Some")),
        section("Run", key_values({"a": {"b": EVIL}, EVIL: [1]}), figure(_png(), EVIL)),
    ]
    write_page(path, f"Title {EVIL}", EVIL, parts)
    return path


def test_page_is_well_formed_escaped_and_alone(report):
    text = report.read_text(encoding="utf-8")
    page = _Reader(text)
    assert text.startswith("<!DOCTYPE html>") and text.count("<html") == 1
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert page.tags.count("img") == 3 and page.tags.count("svg") == 2  # the image in EVIL stays text
    assert "".join(page.text).count(EVIL) >= 10
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert len(links) > 10 and all(link.startswith(("data:image/", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_contents_lead_to_the_sections_and_references_to_what_is_drawn(report):
    page = _Reader(report.read_text(encoding="utf-8"))
    ids = [value for name, value in page.attributes if name == "id"]
    targets = [value[1:] for name, value in page.attributes if name in ("href", "xlink:href") and value[0] == "#"]
    assert len(ids) == len(set(ids))
    assert {"part-1", "part-2", "part-3"} <= set(targets) <= set(ids)
    assert page.tags.count("section") == 3 and "Training & more" in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (pd.NA, "–"),
        (True, "yes"),
        (np.bool_(False), "no"),
        (12047, "12,047"),
        (np.int64(-1), "-1"),
        (0.84125, "0.8413"),
        (0, "0"),
        (0.0, "0.0000"),
        (2e-5, "2e-05"),
        (1234.56, "1,234.6"),
        (float("inf"), "inf"),
        ("a", "a"),
    ],
)
def test_values_as_text(value, text):
    assert as_text(value) == text


def test_intervals_as_text():
    assert interval_text(0.84125, 0.5, 1.0) == "0.8413 [0.5000,\u00a01.0000]"
    assert interval_text(0.5, np.nan, np.nan) == "0.5000"
    assert interval_text(None, None, None) is None is interval_text(np.nan, 0.1, 0.2)
    assert range_text({"estimate": 0.5, "low": 0.25, "high": 0.75}) == "95 % interval 0.2500–0.7500"
    assert range_text({"estimate": 0.5, "low": None, "high": None}) == "no interval"


def test_table_aligns_formats_and_says_what_it_leaves_out():
    frame = pd.DataFrame({"name": ["a", "b", "c"], "score": [0.5, np.nan, 0.25], "n": [1000, 2, 3]})
    made = table(frame, "Scores", {"score": ".2f"}, limit=2)
    assert '<tr><td>a</td><td class="num">0.50</td><td class="num">1,000</td></tr>' in made
    assert '<td>b</td><td class="num">–</td>' in made and "<td>c</td>" not in made
    assert '<th>name</th><th class="num">score</th>' in made
    assert "<caption>Scores (the first 2 of 3 rows)</caption>" in made
    assert "rows)" not in table(frame, "Scores", limit=3)
    assert "no rows yet" in table(frame.iloc[:0], "Scores")


@pytest.mark.parametrize(
    ("values", "cells", "numeric"),
    [
        ([1200, None], ["1,200", "–"], True),  # pandas holds these as floats
        ([0.5, np.nan], ["0.5000", "–"], True),
        ([1.0, np.nan, 0.0], ["1.0000", "–", "0.0000"], True),
        ([3.0, 2.0], ["3.0000", "2.0000"], True),
        (pd.Series([np.float64(0.25), "", None], dtype=object), ["0.2500", "–", "–"], True),
        (pd.Series([7, pd.NA, np.int64(1)], dtype=object), ["7", "–", "1"], True),
        ([float("inf"), np.nan], ["inf", "–"], True),
        ([7, "eight"], ["7", "eight"], False),
        (["", None], ["–", "–"], False),
    ],
)
def test_numbers_stay_numbers_beside_a_blank(values, cells, numeric):
    start = '<td class="num">' if numeric else "<td>"
    body = "".join(f"<tr>{start}{cell}</td></tr>" for cell in cells)
    assert f"<tbody>{body}</tbody>" in table(pd.DataFrame({"n": values}))
    assert table(pd.DataFrame({"n": values}), formats={"n": ".1f"} if numeric else {}).count("–") == cells.count("–")


def test_headings_of_metrics_are_their_names():
    made = table(pd.DataFrame({"map": [0.5], "auroc": [0.5], "mean": [0.5]}))
    assert re.findall('<th class="num">([^<]*)</th>', made) == ["mAP", "AUROC", "mean"]


def probed(tmp_path, fragment, script, width, height=800):
    """The numbers that `script` returns from a page with this fragment."""
    path = tmp_path / "wide.html"
    write_page(path, "t", "s", [section("Part", fragment)])
    probe = (
        f"<script>addEventListener('load', () => {{ document.documentElement.dataset.probe = [{script}] }})</script>"
    )
    text = path.read_text(encoding="utf-8").replace("default-src 'none';", "")
    path.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    dom = browser._run(path, "dump-dom", f"window-size={width},{height}")
    return [float(number) for number in re.search('data-probe="([^"]*)"', dom)[1].split(",")]


BOXES = """(() => { const div = document.querySelector('.table');
  const at = () => ['.table', 'caption', 'td'].map(s => document.querySelector(s).getBoundingClientRect())
    .flatMap(b => [b.left, b.right]);
  const before = at(); div.scrollLeft = 300;
  return [div.scrollWidth - div.clientWidth, ...before, ...at()] })()"""


def test_caption_and_first_column_of_a_wide_table_stay_on_a_phone(tmp_path):
    """The caption wraps at the screen's width instead of the table's, which is scrolled."""
    wide = pd.DataFrame({f"a rather long heading {i}": ["x" * 20] for i in range(12)})
    hidden, *places = probed(tmp_path, table(wide, "A caption of many words " * 6), BOXES, 500)
    assert hidden > 500
    for left, right, caption_left, caption_right, cell_left, cell_right in (places[:6], places[6:]):
        assert left <= caption_left < caption_right <= right and left <= cell_left < cell_right <= right


@pytest.mark.parametrize("columns", [4, 9, 14])
def test_no_column_is_cut_off_on_a_screen(tmp_path, columns):
    numbers = {f"a heading {i}": [0.123456, 12345] for i in range(columns - 1)}
    rows = pd.DataFrame({"image_id": ["1.2.276.0.7230010.3.1.4.8323329.2952.1517875175.464531", "b"], **numbers})
    assert probed(tmp_path, grid(table(rows, "c"), note("beside it")), BOXES, 1300)[0] == 0


def test_a_click_enlarges_a_picture(tmp_path):
    script = """(() => { const image = document.querySelector('img'), before = image.getBoundingClientRect().width;
      image.click(); const box = image.getBoundingClientRect(); image.click();
      const after = image.getBoundingClientRect().width;
      return [before, box.left, box.top, box.width - innerWidth, box.height - innerHeight, after] })()"""
    before, left, top, width, height, after = probed(tmp_path, figure(_png(), "c"), script, 1000)
    assert before == after == 8 and left == top == width == height == 0


def test_text_is_escaped_unless_it_is_ours():
    assert join("a < b") == "<p>a &lt; b</p>"
    assert join(Html("<b>x</b>"), "y") == "<b>x</b>\n<p>y</p>"
    assert key_values({"a": {"b": 1, "c": {}}, "d": [1, "é"]}).count("<dt>") == 3
    assert "<dt>a.b</dt><dd>1</dd>" in key_values({"a": {"b": 1}})
    assert note("\x00\x1b[0m\udcff") == '<aside class="note info" role="note">��[0m�</aside>'
    with pytest.raises(TypeError):
        join(3)


def test_figure_takes_three_formats_and_notes_what_is_not_there_yet():
    assert 'src="data:image/png;base64,iVBOR' in figure(_png(), "c")
    assert 'alt="&lt;c&gt;"' in figure(_png(), "<c>")
    assert 'src="data:image/jpeg;base64,/9j/' in figure(b"\xff\xd8\xff", "c")
    svg = figure(b'<?xml version="1.0"?>\n<svg id="a"><use xlink:href="#a"/><g clip-path="url(#a)"/></svg>', "c")
    assert "<?xml" not in svg and len(set(re.findall(r'(?:id="|#)(f[0-9a-f]{8}-a)\b', svg))) == 1
    assert svg.count("-a") == 3 and 'role="img" aria-label="c"' in svg
    assert "nothing to show yet" in figure(None, "Fold 4")


def test_page_is_written_atomically(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_page(path, "t", "s", [section("x"), 3])
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_browser_shows_the_page_in_light_and_dark_without_broken_pictures(report):
    assert browser.probe(report, 390) == (0, 0, 3)
    light, dark = browser.screenshot(report, 1000, 700), browser.screenshot(report, 390, 700, dark=True)
    assert light.shape == (700, 1000, 3) and dark.shape == (700, 390, 3)
    assert tuple(light[-1, -1]) == (0xF5, 0xF7, 0xF9) and tuple(dark[-1, 0]) == (0x11, 0x16, 0x1B)
    # Text covers a few per cent of either page: not blank, and not all one box.
    assert 0.005 < (light.max(axis=2) < 110).mean() < 0.3
    assert 0.005 < (dark.min(axis=2) > 150).mean() < 0.3


def test_browser_probe_sees_broken_pictures_and_overflow(tmp_path):
    page = tmp_path / "bad.html"
    image = "data:image/png;base64,AAAA"
    page.write_text(f'<html><body><img src="{image}"><div style="width:900px">x</div></body></html>')
    broken, overflow, images = browser.probe(page, 390)
    assert (broken, images) == (1, 1) and overflow > 300


def test_an_interval_in_a_table_wraps_only_before_its_bracket():
    made = table(pd.DataFrame({"AUROC": [interval_text(1.0, 0.9, 1.0), "none"]}))
    assert '<td class="range">1.0000 [0.9000,\u00a01.0000]</td>' in made and "<td>none</td>" in made
