"""Chromium without a window, for tests that judge what a reader would see."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import cv2
import pytest

_FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
_FLAGS += ["disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars"]
_FLAGS += ["virtual-time-budget=3000"]
# Asked of a copy of the page: pictures that failed to decode, pixels by which it is wider than the screen, pictures.
_PROBE = """<script>addEventListener('load', () => { document.documentElement.dataset.probe = [
  [...document.images].filter(image => !image.naturalWidth).length,
  document.documentElement.scrollWidth - innerWidth, document.images.length].join(' ') })</script></body>"""


def chromium():
    """Path of the browser; skips the test, saying so, where none is installed."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium here (Debian: apt-get install chromium), so nobody looks at the page")
    return found[0]


def _run(page, *options):
    with tempfile.TemporaryDirectory() as profile:
        flags = [f"--{flag}" for flag in (*_FLAGS, f"user-data-dir={profile}", *options)]
        done = subprocess.run([chromium(), *flags, Path(page).resolve().as_uri()], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode()


def screenshot(page, width=1200, height=900, dark=False):
    """What the page looks like on a screen of that size, uint8 RGB (height, width, 3)."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "page.png"
        scheme = f"blink-settings=preferredColorScheme={0 if dark else 1}"
        _run(page, f"screenshot={target}", f"window-size={width},{height}", scheme)
        return cv2.imread(str(target))[..., ::-1]


def probe(page, width=1200, height=900):
    """(broken pictures, pixels of sideways overflow, pictures) of the page, as the browser itself counts them."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        text = Path(page).read_text(encoding="utf-8").replace("default-src 'none';", "")
        copy.write_text(text.replace("</body>", _PROBE), encoding="utf-8")
        dom = _run(copy, "dump-dom", f"window-size={width},{height}")
    return tuple(int(n) for n in dom.split('data-probe="')[1].split('"')[0].split())
