"""Wheels of a bundle: this project's own, and those of packages that Kaggle's image lacks."""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from common.errors import InputError

ROOT = Path(__file__).resolve().parents[2]  # root of the checkout
# all are named, because pip before 25 does not treat a newer manylinux as including older ones
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)), "manylinux2014_x86_64")


# Versions are those of Colab's base image (googlecolab/backend-info, pip-freeze.gpu.txt). pydicom is in Kaggle's own
# list (Kaggle/docker-python, kaggle_requirements.txt), which names no version; ours was the newest at that date.
IMAGE_PACKAGES = """
    torch==2.11.0 torchvision==0.26.0 timm==1.0.27 huggingface-hub==1.17.0 albumentations==2.0.8
    opencv-python-headless==4.13.0.92 scikit-learn==1.6.1 scipy==1.16.3 numpy==2.0.2 pandas==2.2.2 pyarrow==18.1.0
    pydicom==3.0.1 numba==0.60.0 safetensors==0.7.0 matplotlib==3.10.0 tqdm==4.67.3 six==1.17.0 pillow==11.3.0
    pywavelets==1.9.0 docstring-parser==0.18.0 typeguard==4.5.2 typing-extensions==4.15.0 packaging==26.2
    setuptools==75.2.0 pyyaml==6.0.3 msgpack==1.1.2 ndindex==1.10.1 numexpr==2.14.1 pydantic==2.12.3 rich==13.9.4
    httpx==0.28.1 threadpoolctl==3.6.0
"""
Image = namedtuple("Image", "date python packages")  # Kaggle's image for notebooks; its versions by package
IMAGE = Image("2026-06", "3.12", dict(package.split("==") for package in IMAGE_PACKAGES.split()))
# Notebooks on Kaggle neither download, upload nor bundle, nor execute notebooks.
UNUSED = ("kaggle", "six", "nbclient", "nbconvert", "ipykernel", "setuptools")


def build_wheel(folder, root=ROOT):
    """Build our wheel into `folder` from a copy and return its path; the same sources give the same bytes."""
    if not (root / "pyproject.toml").is_file():
        raise InputError(f"{root}: no pyproject.toml; a bundle is made from a checkout of this repository")
    with tempfile.TemporaryDirectory(prefix="wheel-") as temporary:
        copy = Path(temporary) / "source"
        copy.mkdir()
        for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
            shutil.copyfile(root / name, copy / name)
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        for name in sorted({pattern.rstrip("*") for pattern in project["packages"]["find"]["include"]}):
            shutil.copytree(root / name, copy / name, ignore=ignore, copy_function=shutil.copyfile)  # plain modes
        build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
        _run_python(["-c", build, temporary], "our wheel cannot be built", copy, SOURCE_DATE_EPOCH="1700000000")
        (built,) = Path(temporary).glob("*.whl")
        return Path(shutil.move(built, Path(folder) / built.name))


def own_requirements(root=ROOT):
    """Return the Requirements of requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in (root / "requirements.txt").read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def fetch_wheels(folder, python, requirements, image=IMAGE):
    """Download wheels of `requirements` and their dependencies that the image does not satisfy into `folder`.

    python: such as `3.12`. Returns the names of the packages that the image provides. Raises InputError.
    """
    machine = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    machine |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    pending, fetched, there = list(requirements), {}, set()
    while pending:
        missing = {}
        for wanted in pending:
            name = canonicalize_name(wanted.name)
            if name in UNUSED or (wanted.marker is not None and not wanted.marker.evaluate(machine)):
                continue
            if name in fetched:
                if not wanted.specifier.contains(fetched[name], prereleases=True):
                    raise InputError(f"{name}: {fetched[name]} is in the bundle, but {wanted} is needed as well")
            elif name in image.packages and wanted.specifier.contains(image.packages[name], prereleases=True):
                there.add(name)
            elif name == "torch":  # it has gigabytes and depends on the machine's drivers
                raise InputError(f"the notebook's image has torch {image.packages['torch']}, but {wanted} is needed")
            else:
                missing[name] = missing.get(name, wanted.specifier) & wanted.specifier
        wheels = _download(folder, python, [f"{name}{specifier}" for name, specifier in missing.items()])
        fetched |= dict(parse_wheel_filename(wheel.name)[:2] for wheel in wheels)
        parts = metadata.distributions(path=list(map(str, wheels)))
        pending = [Requirement(line) for part in parts for line in part.requires or ()]
    return sorted(there - set(fetched))


def _download(folder, python, wanted):
    if not wanted:
        return []
    with tempfile.TemporaryDirectory(prefix="wheels-") as temporary:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        pip = ["-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--progress-bar", "off"]
        options = ["--no-deps", "--only-binary=:all:", "--python-version", python, *platforms, "-d", temporary]
        _run_python([*pip, *options, *wanted], f"no wheels for Python {python}")
        return [Path(shutil.move(wheel, Path(folder) / wheel.name)) for wheel in sorted(Path(temporary).iterdir())]


_UNREACHABLE = ("NewConnectionError", "Failed to establish", "ProxyError", "NameResolution", "ReadTimeout")


def _run_python(words, problem, folder=None, **variables):
    """Run Python with the arguments `words`; if it fails, raise InputError with `problem` and a one-line reason."""
    command, environment = [sys.executable, *words], os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if any(word in line for word in _UNREACHABLE for line in lines):
        raise InputError(f"{problem}: the package index cannot be reached; is there internet here?")
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = " ".join((errors or lines or ["no reason given"])[-1].split())
    raise InputError(f"{problem}: {reason[:300]}")
