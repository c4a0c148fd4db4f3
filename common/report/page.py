"""The report: one self-contained HTML file, made of fragments that escape the text they are given.

    write_page(path, "SIIM pneumothorax", "run siim-1", [
        cards([("Dice", 0.8412, "95 % interval 0.8290–0.8530")]),
        section("Training", "Five folds.", grid(figure(learning_curves(history), "Fold 0")))])

A plain string among fragments is text: it is escaped and becomes a paragraph. Only `Html`, which the functions here
return, is inserted as it is.
"""

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import pandas as pd

from common.paths import write_text


class Html(str):
    """Markup that is safe to insert as it is."""


@dataclass(frozen=True)
class Section:
    """A titled part of the page with an entry in the table of contents."""

    title: str
    body: Html


def as_text(value):
    """Return a value as text: `–` for None and NaN, 12,047 for counts, four decimals for scores."""
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, Real) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        size = abs(value)
        return f"{value:.3g}" if 0 < size < 1e-3 or size >= 1e7 else f"{value:,.1f}" if size >= 100 else f"{value:.4f}"
    return str(value)


def interval_text(estimate, low, high):
    """Return "0.8412 [0.8290, 0.8530]" with a no-break space; None for an estimate that is None or NaN."""
    if as_text(estimate) == "–":
        return None
    return as_text(estimate) + ("" if as_text(low) == "–" else f" [{as_text(low)},\u00a0{as_text(high)}]")


def range_text(interval):
    """Return "95 % interval 0.8290–0.8530" for an interval of score.json: a dict of estimate, low and high."""
    if interval["low"] is None:
        return "no interval"
    return f"95 % interval {as_text(interval['low'])}–{as_text(interval['high'])}"


def join(*fragments):
    """Return the fragments one after another, plain strings as escaped paragraphs; TypeError for anything else."""
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


def note(text, kind="info"):
    """Return a box with a remark; `kind` is "info" or "warning"."""
    return Html(f'<aside class="note {kind}" role="note">{_escape(text)}</aside>')


def figure(image, caption):
    """Return a picture with its caption: PNG or JPEG bytes as a data URI, our own SVG bytes (see `plots`) inline.

    `image` None, which a plot returns when there is nothing to draw, gives a note instead.
    """
    if image is None:
        return note(f"{caption}: nothing to show yet.")
    alt = _escape(caption)
    if image.lstrip()[:5] in (b"<?xml", b"<svg "):
        picture = _inline_svg(image, alt)
    else:
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        picture = f'<img src="data:image/{kind};base64,{base64.b64encode(image).decode()}" alt="{alt}">'
    return Html(f"<figure>{picture}<figcaption>{alt}</figcaption></figure>")


def _inline_svg(image, alt):
    svg = image.decode()
    svg = svg[svg.index("<svg ") :]
    # Ids are shared by all drawings of a page, so each gets a prefix of its own.
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
    """Return fragments that stay folded until the reader opens them."""
    return Html(f"<details><summary>{_escape(summary)}</summary>{join(*fragments)}</details>")


def key_values(values):
    """Return a dictionary as a list of names and values; nested ones (a configuration) get dotted names."""
    inner = "".join(f"<dt>{_escape(key)}</dt><dd>{_escape(value)}</dd>" for key, value in _flatten(values))
    return Html(f'<dl class="keys">{inner}</dl>')


def _flatten(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple | dict):
            yield f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False)
        else:
            yield f"{prefix}{key}", value


def table(frame, caption="", formats=None, limit=100):
    """Return a table of the columns of `frame` (without its index), numbers aligned to the right.

    `formats` maps a column to a format specification such as ".3f"; other values are formatted by `as_text`. Past
    `limit` rows the caption says how many are left out.
    """
    formats = formats or {}
    if len(frame) == 0:
        return note(f"{caption or 'Table'}: no rows yet.")
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
    rows = frame.head(limit)
    columns = [[_cell(v, formats.get(name)) for v in rows.iloc[:, i].tolist()] for i, name in enumerate(frame.columns)]
    body = "".join(_row("td", row, numeric) for row in zip(*columns, strict=True))
    if len(frame) > limit:
        caption = f"{caption} (the first {limit:,} of {len(frame):,} rows)".strip()
    caption = f"<caption>{_escape(caption)}</caption>" if caption else ""
    head = _row("th", frame.columns, numeric)
    return Html(f'<div class="table"><table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table></div>')


def _cell(value, spec):
    text = as_text(value)
    return text if spec is None or text == "–" else format(value, spec)


def _row(tag, values, numeric):
    start = {True: f'<{tag} class="num">', False: f"<{tag}>"}
    return "<tr>" + "".join(f"{start[n]}{_escape(v)}</{tag}>" for v, n in zip(values, numeric, strict=True)) + "</tr>"


def _escape(value):
    # HTML forbids control codes; surrogates, from file names that are not UTF-8, could not be written.
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "�", as_text(value)))


def write_page(path, title, subtitle, fragments):
    """Write the page to `path` atomically; `fragments` are sections, other fragments and plain text.

    The file fetches nothing: its own policy forbids scripts and every address but data URIs.
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
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{_CSS}</style>'
    )
    main = f"<main>{header}\n" + "\n".join(body) + "</main>"
    write_text(path, f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{contents}\n{main}</body></html>\n')


_CSS = """
:root { --page: #f5f7f9; --card: #fff; --ink: #1d2731; --muted: #5b6976; --rule: #dde3e8; --accent: #0a67a8;
  --blue: #0072b2; --info: #e8f2fa; --warn: #fff4dc;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #11161b; --card: #1a2128; --ink: #e3e9ee;
  --muted: #9cabb8; --rule: #303b45; --accent: #6cb8ee; --blue: #56b4e9; --info: #172b3b; --warn: #342a12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; display: grid; grid-template-columns: 14rem minmax(0, 1fr);
  background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); overflow-wrap: break-word; }
main { padding: 2.5rem 2rem 4rem; min-width: 0; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow: auto; padding: 2.9rem 0 2rem 1.5rem;
  display: flex; flex-direction: column; font-size: .9rem; }
main a { color: var(--accent); }
nav a { color: var(--muted); text-decoration: none; padding: .3rem .8rem; border-left: 2px solid var(--rule); }
nav a:hover, nav a:focus { color: var(--accent); border-color: var(--accent); }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.35rem; margin: 0 0 .8rem; } section { margin-top: 2.8rem; scroll-margin-top: 1.5rem; }
p { max-width: 46rem; margin: .6rem 0; }
header p, .label, .hint, figcaption, caption, dt { color: var(--muted); font-size: .85rem; }
header p { margin: .4rem 0 1.6rem; font-size: 1rem; }
.cards, .grid, .table, .keys, details, .note, figure { margin: 1rem 0; }
.card, figure, .table, .keys, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.cards, .grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.card, .keys, details, .note { padding: .8rem 1.1rem; }
.value { font-size: 1.8rem; font-weight: 650; line-height: 1.3; letter-spacing: -.02em; }
.grid { align-items: start; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(10.2rem, 1fr)); gap: .8rem; }
figure { padding: .9rem; overflow: hidden; } .grid > * { margin: 0; }
figure svg, figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { line-height: 1.4; margin-top: .6rem; overflow-wrap: anywhere; } .small figure { padding: 0; }
.small img { width: 100%; } .small figcaption { padding: 0 .7rem .6rem; } .table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption, th, td { text-align: left; padding: .45rem 1rem; min-width: 9rem; }
th, td { border-top: 1px solid var(--rule); } .num { text-align: right; white-space: nowrap; min-width: 0; }
tbody tr:hover { background: var(--info); }
.note { border-left: 4px solid var(--accent); background: var(--info); border-radius: 6px; }
.warning { border-color: #d98e04; background: var(--warn); }
.keys { display: grid; grid-template-columns: minmax(8rem, max-content) minmax(0, 1fr); gap: .25rem 1.5rem;
  font-size: .87rem; }
dd { margin: 0; overflow-wrap: anywhere; } summary { cursor: pointer; font-weight: 600; }
.legend i { display: inline-block; width: 1.4em; border-top: 3px solid; vertical-align: middle; margin: 0 .4em 0 0; }
.legend span { margin-right: 1.4em; }
@media (max-width: 56rem) { body { display: block; } main { padding: 1.3rem 1rem 3rem; } h1 { font-size: 1.55rem; }
  nav { flex-direction: row; padding: 0 .5rem; background: var(--page); border-bottom: 1px solid var(--rule);
  white-space: nowrap; z-index: 1; } nav a { border: 0; padding: .75rem .6rem; }
  section { scroll-margin-top: 3.6rem; } .value { font-size: 1.5rem; } figure { padding: .6rem; } }
@media print { body { display: block; max-width: none; font-size: 11pt; background: none; } nav { display: none; }
  main { padding: 0; } table { font-size: 8.5pt; } td { overflow-wrap: anywhere; }
  th, td { min-width: 0; padding: .3rem .6rem; }
  figure, .card, .note, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""
