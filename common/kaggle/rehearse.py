"""A notebook tried here before Kaggle has it: on what Kaggle's image has, from the bundle alone, without a network.

The network is closed twice: the kernel runs in a network namespace of its own, where the system allows one, and each
attempt of a Python program to use a socket of the internet is refused and written down.
"""

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.errors import InputError
from common.kaggle.bundle import write_bundle
from common.kaggle.notebook import NOTEBOOK, write_notebook
from common.kaggle.wheels import IMAGE

log = logging.getLogger(__name__)
DATASET = "rehearsal/cxr-bundle"
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


def rehearse(solution, source, run, data, folder, export):
    """Bundle a finished run, execute its notebook on a stand-in for Kaggle's machine; returns the executed file.

    data: the competition's folder, which is mounted; folder: where everything is made, emptied of what a call before
    left; export: as in `bundle_tool`. Raises InputError where the notebook fails, a socket was tried, or the
    submission is not the run's own, byte for byte.
    """
    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    run, folder = Path(run).resolve(), Path(folder).resolve()
    for name in ("input", "notebook", "machine", "kernel"):
        shutil.rmtree(folder / name, ignore_errors=True)
    place = "competitions/" + source.slugs[0] if source.kind == "competition" else "datasets/" + source.slugs[0]
    inputs, executed = folder / "input", folder / "executed.ipynb"
    executed.unlink(missing_ok=True)
    write_bundle([run], inputs / "datasets" / DATASET, export, f"{sys.version_info.major}.{sys.version_info.minor}")
    (inputs / place).parent.mkdir(parents=True, exist_ok=True)
    (inputs / place).symlink_to(Path(data).resolve())
    write_notebook(folder / "notebook", solution, source, run.name, DATASET)
    try:
        book, working, attempts = execute(
            folder / "notebook" / NOTEBOOK, make_machine(folder / "machine"), folder / "kernel", inputs
        )
    except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError, subprocess.SubprocessError) as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"{folder / 'notebook' / NOTEBOOK}: fails without internet ({last})") from None
    if attempts:
        raise InputError(f"{folder / 'notebook' / NOTEBOOK}: asked for the network ({attempts[0]})")
    if (working / "submission.csv").read_bytes() != (run / "submission.csv").read_bytes():
        raise InputError(f"{working / 'submission.csv'}: differs from the run's own, {run / 'submission.csv'}")
    nbformat.write(book, executed)
    log.info(f"{executed}: run without network, from the bundle alone; its submission is the run's own")
    return executed


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


def execute(notebook, python, folder, inputs, more=()):
    """Execute a notebook's file on this machine with `inputs` mounted; `more` code cells are put behind its own.

    Returns the executed notebook, what was written to the working folder's place, `folder`/working, and the attempts
    to use the network, one a line.
    """
    import nbformat  # late: the notebook itself needs none of it
    from jupyter_client.manager import KernelManager
    from nbclient import NotebookClient

    working, attempts = folder / "working", folder / "attempts.txt"
    working.mkdir(parents=True)
    attempts.touch()
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    book.cells += [nbformat.v4.new_code_cell(code) for code in more]
    spec = folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps(
            {"argv": [*(NAMESPACE if namespaces() else ()), *command], "display_name": "Python 3", "language": "python"}
        )
    )
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        "KAGGLE_INPUT": str(inputs),
        "KAGGLE_WORKING": str(working),
        "NETWORK_ATTEMPTS": str(attempts),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 characters at most
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{short}/k")
        manager.kernel_spec_manager.kernel_dirs = [str(spec.parent)]
        client = NotebookClient(book, km=manager, timeout=600, resources={"metadata": {"path": str(working)}})
        client.execute(env=environment)
    return book, working, attempts.read_text().splitlines()
