"""The report: one self-contained HTML file, made of fragments whose text is escaped.

A plain string among fragments becomes an escaped paragraph; `Html`, which the functions here return, stays as it is.
"""

import base64
import hashlib
import html
import re
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import flatten
from common.paths import write_text

METRICS = {"ap": "AP", "auroc": "AUROC", "dice": "Dice", "iou": "IoU", "map": "mAP", "mcc": "MCC"}
METRICS["map_coco"] = "mAP of COCO"
BESIDE, LARGE = 4, 9  # columns of a table that fit beside another table, and in the usual font size


class Html(str):
    """Markup that is safe to insert as it is."""


@dataclass(frozen=True)
class Section:
    """A titled part of the page with an entry in the table of contents."""

    title: str
    body: Html


def as_text(value):
    """Return a value as text: `–` for None and NaN, 12,047 for counts, four decimals for scores."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        size = abs(value)
        return f"{value:.3g}" if 0 < size < 1e-3 or size >= 1e7 else f"{value:,.1f}" if size >= 100 else f"{value:.4f}"
    return str(value)


_INTERVAL = re.compile(r"\S{1,9} \[\S{1,9},\u00a0\S{1,9}\]")  # as made by `interval_text`


def interval_text(estimate, low, high):
    """Return "0.8412 [0.8290, 0.8530]" with a no-break space; None if the estimate is None or NaN."""
    if as_text(estimate) == "–":
        return None
    return as_text(estimate) + ("" if as_text(low) == "–" else f" [{as_text(low)},\u00a0{as_text(high)}]")


def range_text(interval):
    """Return "95 % interval 0.8290–0.8530" for an interval of score.json: a dict of estimate, low and high."""
    if interval["low"] is None:
        return "no interval"
    return f"95 % interval {as_text(interval['low'])}–{as_text(interval['high'])}"


def join(*fragments):
    """Return the concatenated fragments, plain strings as escaped paragraphs; TypeError for anything else."""
    parts = []
    for part in fragments:
        if not isinstance(part, str):
            raise TypeError(f"a fragment is Html or text, not {type(part).__name__}")
        parts.append(part if isinstance(part, Html) else f"<p>{_escape(part)}</p>")
    return Html("\n".join(parts))


def section(title, *fragments):
    """Return a part of the page with a heading and an entry in the table of contents."""
    return Section(str(title), join(*fragments))


def cards(items):
    """Return headline figures; `items` are (label, value, hint), numbers are formatted by `as_text`."""
    inner = "".join(
        f'<div class="card"><div class="label">{_escape(label)}</div><div class="value">{_escape(value)}</div>'
        f'<div class="hint">{_escape(hint)}</div></div>'
        for label, value, hint in items
    )
    return Html(f'<div class="cards">{inner}</div>')


def items(texts):
    """Return a list of texts, in which parts between backticks are formatted as code."""
    inner = re.sub("`([^`]+)`", r"<code>\1</code>", "".join(f"<li>{_escape(text)}</li>" for text in texts))
    return Html(f"<ul>{inner}</ul>")


def note(text, kind="info"):
    """Return a box with a remark; `kind` is "info" or "warning"."""
    return Html(f'<aside class="note {kind}" role="note">{_escape(text)}</aside>')


def rules_table(rule, part_rules):
    """Return the table of decision rules (dicts): one per part, then the submission's."""
    rules = {f"part {part}": each for part, each in part_rules.items()} | {"the submission": rule}
    return pd.DataFrame([{"used for": name, **each} for name, each in rules.items()])


def nested_note(nested_by, metric, not_nested):
    """Return the note that says how the score was measured, and what the score would be without nesting."""
    how = f"Nested by {nested_by}: each part of the images is scored with a rule chosen on the others."
    return note(f"{how} Chosen and scored on the same images, the {metric} would be {not_nested:.4f}.")


def figure(image, caption):
    """Return a picture with its caption: PNG or JPEG bytes as a data URI, our own SVG bytes (see `plots`) inline.

    A click enlarges the picture, by a check box before it since the page has no scripts. A plot with nothing to draw
    returns None; `image` None gives a note instead of a picture.
    """
    if image is None:
        return note(f"{caption}: nothing to show yet.")
    alt = _escape(caption)
    if image.lstrip()[:5] in (b"<?xml", b"<svg "):
        picture = _inline_svg(image, alt)
    else:
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        picture = f'<img src="data:image/{kind};base64,{base64.b64encode(image).decode()}" alt="{alt}">'
    picture = f'<label class="zoom"><input type="checkbox" aria-label="enlarge">{picture}</label>'
    return Html(f"<figure>{picture}<figcaption>{alt}</figcaption></figure>")


def _inline_svg(image, alt):
    svg = image[image.index(b"<svg ") :].decode()
    # ids are global on a page, so each drawing's ids get a prefix of their own
    prefix = "f" + hashlib.sha256(image).hexdigest()[:8] + "-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def link(path, text):
    """Return a link to another file, `path` relative to the page."""
    return Html(f'<a href="{_escape(path)}">{_escape(text)}</a>')


def grid(*figures, small=False):
    """Return figures side by side, as many as fit; `small` for many small pictures."""
    return Html(f'<div class="grid{" small" if small else ""}">{join(*figures)}</div>')


def details(summary, *fragments):
    """Return fragments that are collapsed until the reader opens them."""
    return Html(f"<details><summary>{_escape(summary)}</summary>{join(*fragments)}</details>")


def key_values(values):
    """Return a dictionary as a list of names and values, nested ones with dotted names."""
    inner = "".join(f"<dt>{_escape(key)}</dt><dd>{_escape(value)}</dd>" for key, value in flatten(values))
    return Html(f'<dl class="keys">{inner}</dl>')


def table(frame, caption="", formats=None, limit=100):
    """Return a table of the columns of `frame` (without its index), numbers aligned to the right.

    `formats` maps a column to a format specification such as ".3f"; other values are formatted by `as_text`. A table
    with more than `limit` rows is cut, and the caption says so.
    """
    if len(frame) == 0:
        return note(f"{caption or 'Table'}: no rows yet.")
    read = [_column(frame.iloc[:limit, i], (formats or {}).get(name)) for i, name in enumerate(frame.columns)]
    columns, numeric = zip(*read, strict=True)
    body = "".join(_row("td", row, numeric) for row in zip(*columns, strict=True))
    if len(frame) > limit:
        caption = f"{caption} (the first {limit:,} of {len(frame):,} rows)".strip()
    caption = f"<caption>{_escape(caption)}</caption>" if caption else ""
    head = _row("th", [METRICS.get(name, str(name).replace("_", " ")) for name in frame.columns], numeric)
    size = " wide" * (len(numeric) > BESIDE) + " dense" * (len(numeric) > LARGE)
    return Html(f'<div class="table{size}"><table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table></div>')


def _column(column, spec):
    """Return a column's cells as text, and whether all but blanks are numbers; counts beside blanks stay integers."""
    values = [None if as_text(value) in ("", "–") else value for value in column.tolist()]
    given = [value for value in values if value is not None]
    numeric = pd.api.types.is_numeric_dtype(column) or (given and all(isinstance(value, Real) for value in given))
    # in pandas, a blank turns counts into floats; a column of only 0 and 1 may hold scores and is left alone
    if numeric and len(given) < len(values) and max(given, default=0) > 1 and all(v % 1 == 0 for v in given):
        values = [None if value is None else int(value) for value in values]
    return [as_text(v) if spec is None or v is None else format(v, spec) for v in values], bool(numeric)


def _row(tag, values, numeric):
    cells = []
    for value, is_number in zip(values, numeric, strict=True):
        kind = "num" if is_number else "range" if _INTERVAL.fullmatch(str(value)) else None
        start = f'<{tag} class="{kind}">' if kind else f"<{tag}>"
        cells.append(f"{start}{_escape(value)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _escape(value):
    # HTML forbids control codes, and surrogates (from file names that are not UTF-8) cannot be encoded
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "�", as_text(value)))


def write_page(path, title, subtitle, fragments):
    """Write the page to `path` atomically; `fragments` are sections, other fragments and plain text.

    The file is self-contained: its content security policy forbids scripts and all URLs except data URIs.
    """
    links, body = [], []
    for fragment in fragments:
        if isinstance(fragment, Section):
            anchor, heading = f"part-{len(links) + 1}", _escape(fragment.title)
            links.append(f'<a href="#{anchor}">{heading}</a>')
            body.append(f'<section id="{anchor}"><h2>{heading}</h2>\n{fragment.body}</section>')
        else:
            body.append(join(fragment))
    title = _escape(title)
    header = f"<header><h1>{title}</h1><p>{_escape(subtitle)}</p></header>"
    contents = f'<nav aria-label="Contents">{"".join(links)}</nav>'
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style>'
    )
    main = f"<main>{header}\n" + "\n".join(body) + "</main>"
    write_text(path, f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{contents}\n{main}</body></html>\n')
