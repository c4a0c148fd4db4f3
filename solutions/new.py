"""The command `cxr new`: copy a solution as the skeleton for another challenge."""

import re
import shutil
from pathlib import Path

from common.errors import InputError
from common.paths import write_text

ROOT = Path(__file__).parents[1]
MAIN, CONTRACT = "solutions/__main__.py", "tests/solutions/contract.py"
NAMES, CASE = (
    r'(?<=^NAMES = \()[^)]*"{0}"',
    r'^    Case\(\n        "{0}",\n.*?^    \),\n',
)  # regular expressions for the entries of the copied solution


def new(name: str, /, *, like: str = "rsna_pneumonia"):
    """Copy a solution as `name`, and register it in the command line and in the contract tests.

    Args:
        name: Name of the new solution: lower-case letters, digits and underscores.
        like: Solution to copy.
    """
    folder, source, texts = ROOT / "solutions" / name, ROOT / "solutions" / like, {}
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise InputError(f"{name!r}: the name of a solution has lower-case letters, digits and underscores")
    is_command = name in ("bundle", "demo", "log", "new", "pull", "push")
    if is_command or folder.exists() or folder.with_suffix(".py").exists():
        raise InputError(f"{name}: the name is taken")
    for path, pattern in ((MAIN, NAMES), (CONTRACT, CASE)):
        text = (ROOT / path).read_text("utf-8") if (ROOT / path).is_file() else ""
        entry = re.search(pattern.format(like), text, re.MULTILINE | re.DOTALL)
        if not (source / "pipeline.py").is_file() or entry is None:
            raise InputError(f"--like {like}: no such solution in {ROOT / path}; `new` works in a checkout")
        more = f', "{name}"' if path == MAIN else entry[0].replace(f'"{like}"', f'"{name}"')
        texts[ROOT / path] = text[: entry.end()] + more + text[entry.end() :]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__", "README.md"))
    texts |= {path: path.read_text("utf-8").replace(like, name) for path in folder.glob("*.py")}
    for path, text in texts.items():
        write_text(path, text)
    print(f"{folder}: a copy of {like}; CONTRIBUTING.md says what to change, and in which order")
    print(f"run its contract tests: python -m pytest tests/solutions -k {name}")
