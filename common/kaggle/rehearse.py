"""Test a Kaggle notebook locally, with only the packages of Kaggle's image and of the bundle, and without network.

Every attempt of Python code to open an internet socket is refused and recorded.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.errors import InputError, log
from common.kaggle.bundle import DATASET, write_bundle
from common.kaggle.notebook import IMAGES, INFERENCE, write_inference_notebook
from common.kaggle.wheels import IMAGE
from common.paths import write_json

JUPYTER = ("ipykernel", "pip", "psutil")  # packages that the image has as well
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
    """Bundle a finished run, execute its notebook on a stand-in for Kaggle's machine and return the executed file.

    data: the competition's folder, to be mounted, or a folder of images if there is no competition. folder: for all
    files; those of an earlier call are removed. export: as in `bundle_tool`. Raises InputError if the notebook fails,
    warns or tries to use the network, or if its submission is not identical to the run's.
    """
    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    run, folder = Path(run).resolve(), Path(folder).resolve()
    for name in ("input", "notebook", "machine", "kernel"):
        shutil.rmtree(folder / name, ignore_errors=True)
    place = folder / "input" / ("competitions" if source.kind == "competition" else "datasets")
    place = place / (IMAGES if source.kind == "none" else source.slugs[0])
    notebook, executed = folder / "notebook" / INFERENCE, folder / "executed.ipynb"
    executed.unlink(missing_ok=True)
    bundle, python = folder / "input" / "datasets" / DATASET, f"{sys.version_info.major}.{sys.version_info.minor}"
    write_bundle([run], bundle, export, python)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(Path(data).resolve())
    write_inference_notebook(notebook.parent, solution, source, run.name, DATASET)
    try:
        machine = make_machine(folder / "machine")
        book, working, attempts = execute(notebook, machine, folder / "kernel", folder / "input")
    except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError, subprocess.SubprocessError) as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"{notebook}: fails without internet ({last})") from None
    for problem, lines in {"tried to use the network": attempts, "warns": find_warnings(book)}.items():
        if lines:
            raise InputError(f"{notebook}: {problem} ({lines[0]})")
    if (working / "submission.csv").read_bytes() != (run / "submission.csv").read_bytes():
        raise InputError(f"{working / 'submission.csv'}: differs from the run's own, {run / 'submission.csv'}")
    nbformat.write(book, executed)
    log.info(f"{executed}: run from the bundle alone, without network; its submission equals the run's")
    return executed


def make_machine(folder):
    """Make an environment in `folder` with the installed packages that Kaggle's image has; return its Python."""
    packages, image = folder / "image", folder / "venv"
    packages.mkdir(parents=True)
    for name in _find_dependencies([*IMAGE.packages, *JUPYTER]):
        for top in {Path(file).parts[0] for file in metadata.files(name) or () if ".." not in Path(file).parts}:
            source = Path(sysconfig.get_paths()["purelib"]) / top
            if top != "__pycache__" and source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", image], check=True)
    (site,) = image.glob("lib/python*/site-packages")
    (site / "closed_network.py").write_text(f"{CLOSED}sys.path.append({str(packages)!r})\n")
    (site / "image.pth").write_text("import closed_network\n")
    return image / "bin" / "python"


def _find_dependencies(names):
    """Return the sorted names of the installed distributions among `names` and their dependencies."""
    found, pending = set(), list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name in found:
            continue
        try:
            needs = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        pending += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return sorted(found)


def find_warnings(book):
    """Return the lines of an executed notebook's output that are warnings."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    lines = [line for output in outputs for line in output.get("text", "").splitlines()]
    return [line.strip() for line in lines if re.search(r"\b\w*Warning: |\bWARNING\b", line)]


def execute(notebook, python, folder, inputs, more=()):
    """Execute a notebook file, then the code cells in `more`, with the interpreter `python` and `inputs` mounted.

    Returns the executed notebook, the folder with its output, and attempts to use the network, one per line.
    """
    import nbformat  # late: not in Kaggle's bundle, and slow
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
    write_json(spec / "kernel.json", {"argv": command, "display_name": "Python 3", "language": "python"})
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {
        "KAGGLE_INPUT": str(inputs),
        "KAGGLE_WORKING": str(working),
        "NETWORK_ATTEMPTS": str(attempts),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's warning; Kaggle's image has ipywidgets
    }
    with tempfile.TemporaryDirectory() as short:  # socket paths are limited to 107 characters
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{short}/k")
        manager.kernel_spec_manager.kernel_dirs = [str(spec.parent)]
        client = NotebookClient(book, km=manager, timeout=600, resources={"metadata": {"path": str(working)}})
        client.execute(env=environment)
    return book, working, attempts.read_text().splitlines()
