"""The local server speaks with the real client of notebooks and data sets too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import InputError
from common.kaggle import client

KERNEL = {
    "id": "chest/my-notebook",
    "title": "My notebook",
    "code_file": "n.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "enable_internet": False,
    "enable_gpu": True,
    "competition_sources": ["a-slug"],
    "dataset_sources": ["chest/not-there"],
}


def test_data_sets_and_notebooks(server, home, tmp_path):
    server.competitions["a-slug"], server.polls = b"", 0
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "dataset-metadata.json").write_text(
        json.dumps({"id": "chest/my-bundle", "title": "My bundle", "licenses": [{"name": "CC0-1.0"}]})
    )
    (folder / "a.whl").write_bytes(b"wheel")
    said = client.run(["datasets", "create", "-p", str(folder)], "dataset chest/my-bundle")
    assert "private Dataset is being created" in said
    assert server.created["chest/my-bundle"]["files"] == {"a.whl": b"wheel"}
    assert client.run(["datasets", "status", "chest/my-bundle"], "dataset chest/my-bundle") == "ready"
    (folder / "n.ipynb").write_text(json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (folder / "kernel-metadata.json").write_text(json.dumps(KERNEL))
    said = client.run(["kernels", "push", "-p", str(folder)], "notebook chest/my-notebook")
    assert "Kernel version 1 successfully pushed" in said and "not valid dataset sources" in said
    asked = server.kernels["chest/my-notebook"]["asked"]
    assert asked["enableInternet"] is False and asked["enableGpu"] is True
    said = client.run(["kernels", "status", "chest/my-notebook"], "notebook chest/my-notebook")
    assert said == 'chest/my-notebook has status "KernelWorkerStatus.COMPLETE"'
    with pytest.raises(InputError, match="Dataset creation error: The requested title"):
        client.run(["datasets", "create", "-p", str(folder)], "dataset chest/my-bundle")


def test_it_runs_by_itself(tmp_path):
    program = Path(__file__).parents[2] / "kaggle_server.py"
    with subprocess.Popen([sys.executable, program], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith("export HOME=kaggle-home")
        finally:
            process.kill()
