"""A stand-in for Kaggle's notebook machine: its packages but ours, its mounts, and no network.

The network is closed twice: the kernel runs in a network namespace of its own, where the system allows one, and each
attempt of a Python program to use a socket of the internet is refused and written down. `python -m tests.notebooks`
writes the notebooks that the repository keeps.
"""

import functools
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from packaging.utils import canonicalize_name

from common.kaggle.bundle import DATASET
from common.kaggle.notebook import NOTEBOOK, write_notebook
from common.kaggle.wheels import IMAGE, UNUSED, own_requirements
from solutions.__main__ import main

KEPT = {"siim_pneumothorax": "siim-1", "vinbigdata": "vinbigdata-1", "chestxray14": "chestxray14-1"}  # runs' names
MACHINE = ("ipykernel", "pip", "psutil")  # in the image too, for the notebook itself
NAMESPACE = ("unshare", "--user", "--map-root-user", "--net")
CLOSED = """
import os, socket, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and args[0].family == socket.AF_UNIX:
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
            print(event, *args, file=file)
        raise OSError("the network is closed")

sys.addaudithook(refuse)
"""


@functools.cache
def namespaces():
    """Whether this system lets us make network namespaces."""
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def make_machine(folder):
    """An environment in `folder` with what Kaggle's image has, and without ours; returns its python."""
    packages, image = folder / "image", folder / "venv"
    packages.mkdir(parents=True)
    for name in _closure([*IMAGE.packages, *MACHINE]):
        for top in {Path(file).parts[0] for file in metadata.files(name) or () if ".." not in Path(file).parts}:
            source = Path(sysconfig.get_paths()["purelib"]) / top
            if top != "__pycache__" and source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", image], check=True)
    (site,) = image.glob("lib/python*/site-packages")
    (site / "closed_network.py").write_text(CLOSED)
    (site / "image.pth").write_text(f"{packages}\nimport closed_network\n")
    return image / "bin" / "python"


def _closure(names):
    """Names of the installed distributions among these and what they need."""
    from packaging.requirements import Requirement

    found, open_ones = set(), list(names)
    while open_ones:
        name = canonicalize_name(open_ones.pop())
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        needs = [Requirement(line) for line in needs]
        open_ones += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sorted(found)


def repack(names, folder):
    """Wheels of installed packages, as an index has them: what pip downloads from where there is no network."""
    folder.mkdir()
    for name in names:
        dist = metadata.distribution(name)
        tags = [line[5:].split("-") for line in dist.read_text("WHEEL").splitlines() if line.startswith("Tag: ")]
        tag = "-".join(".".join(dict.fromkeys(parts)) for parts in zip(*tags, strict=True))
        stem = f"{dist.name.replace('-', '_')}-{dist.version}-{tag}"
        with zipfile.ZipFile(folder / f"{stem}.whl", "w") as archive:
            for file in dist.files:
                if ".." not in file.parts and "__pycache__" not in file.parts and file.locate().is_file():
                    archive.write(file.locate(), str(file))
    return folder


def lacking():
    """Names of the packages that a bundle carries beside ours."""
    names = (canonicalize_name(requirement.name) for requirement in own_requirements())
    return [name for name in names if name not in (*IMAGE.packages, *UNUSED)]


def execute(notebook, python, folder, inputs, more=()):
    """Execute a notebook's file on this machine with `inputs` mounted; `more` code cells are put behind its own.

    Returns the executed notebook, what was written to the working folder's place, `folder`/working, and the attempts
    to use the network, one a line.
    """
    working, attempts = folder / "working", folder / "attempts.txt"
    working.mkdir(parents=True)
    attempts.touch()
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    book.cells += [nbformat.v4.new_code_cell(code) for code in more]
    spec = folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": [*(NAMESPACE if namespaces() else ()), *command],
                                                  "display_name": "Python 3", "language": "python"}))  # fmt: skip
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"KAGGLE_INPUT": str(inputs), "KAGGLE_WORKING": str(working), "NETWORK_ATTEMPTS": str(attempts),
                    "PATH": f"{python.parent}:{os.environ['PATH']}", "IPYTHONDIR": str(folder / "ipython")}  # fmt: skip
    manager = KernelManager(kernel_name="python3", transport="ipc", ip=str(folder / "k"))
    manager.kernel_spec_manager.kernel_dirs = [str(spec.parent)]
    client = NotebookClient(book, km=manager, timeout=600, resources={"metadata": {"path": str(working)}})
    client.execute(env=environment)
    return book, working, attempts.read_text().splitlines()


def printed(book):
    """All that the cells of an executed notebook printed, in one text."""
    return "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))


WHERE = """
import common, imagehash, solutions, sys, os, torch, tyro
for module in (common, solutions, tyro, imagehash, torch):
    print("from", module.__name__, module.__file__)
for folder in sys.path:
    print("path", folder)
print("seconds", sum(os.times()[:4]))"""


def check_where(said, python):
    """What `WHERE` printed shows that ours and what the image lacks are the bundle's; no checkout is on the path."""
    home = python.parents[1]
    places = dict(line.split()[1:] for line in said.splitlines() if line.startswith("from "))
    assert set(places) == {"common", "solutions", "tyro", "imagehash", "torch"}
    for name, place in places.items():
        assert Path(place).is_relative_to(home.parent / "image" if name == "torch" else home), place
    folders = [Path(line[5:]) for line in said.splitlines() if line.startswith("path ") and line[5:]]
    assert folders
    for folder in folders:
        assert not (folder / "pyproject.toml").exists()
        assert folder.is_relative_to(home) or not (folder / "common").exists()


def take_no_index(monkeypatch, folder):
    """Let pip find in `folder`, which is made, the wheels that a bundle needs, and nothing elsewhere."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(repack(lacking(), folder)))


def round_trip(run, solution, mounts, folder, monkeypatch, dataset="datasets/somebody/chest-x-rays"):
    """Bundle a finished run, write its notebook and execute it on this machine, with test images mounted.

    mounts: folders by their places among the inputs; dataset: the bundle's place there. Asserts that the submission has
    the bytes of the run's own, that the bundle alone was used, and that no socket was. Returns what the last of the
    notebook's own cells put out, as text.
    """
    take_no_index(monkeypatch, folder / "index")
    inputs, python = folder / "input", f"{sys.version_info.major}.{sys.version_info.minor}"
    assert main(["bundle", str(run), "--out", str(inputs / dataset), "--python", python]) == 0
    name = f"somebody/{Path(dataset).name}"
    words = ["notebook", "--run", str(run), "--dataset", name, "--out", str(folder / "notebook")]
    assert main([solution, *words]) == 0
    for place, source in mounts.items():
        (inputs / place).parent.mkdir(parents=True, exist_ok=True)
        (inputs / place).symlink_to(source)
    machine = make_machine(folder / "machine")
    notebook = folder / "notebook" / NOTEBOOK
    book, working, attempts = execute(notebook, machine, folder / "kernel", inputs, [WHERE])
    assert attempts == []
    assert [path.name for path in working.iterdir()] == ["submission.csv"]
    assert (working / "submission.csv").read_bytes() == (run / "submission.csv").read_bytes()
    said = printed(book)
    assert f"valid submission: {working / 'submission.csv'}" in said
    check_where(said, machine)
    return str(book.cells[-2].outputs)


def write_kept(root):
    """Write the notebooks that the repository keeps."""
    for solution, run in KEPT.items():
        source = import_module(f"solutions.{solution}.config").KAGGLE
        write_notebook(root / solution, solution, source, run, DATASET)


if __name__ == "__main__":
    write_kept(Path("notebooks"))
