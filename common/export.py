"""The tools `export` and `infer`: a run is exported to a folder, from which new images are predicted."""

import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from common import processes
from common.blend import Member, mixing_of, write_mixed
from common.config import file_hash, from_dict, to_dict
from common.data.coco import write_boxes
from common.errors import InputError, check, log
from common.extras import require_extra
from common.hub import fetch, repo_of
from common.images import prepare_test
from common.infer.mixing import value_columns
from common.job import open_job, open_run
from common.nn.detectors import Detector
from common.nn.onnx import write_onnx
from common.options import Options, check_device
from common.paths import copy_file, read_json, read_parquet, write_json, write_table
from common.predictions import Predicted, predict_test, predicting_networks, read_predictions
from common.recipe import neutral_of, read_rule, read_score, write_answer
from common.step import require
from common.teaching import describe_lessons
from common.train import distributed
from common.trained import ABOUT, FORMAT, Trained, clear_export

WORKING = Path("/kaggle/working")
COCO = "submission.coco.json"
CHECKED = 4  # number of images on which an ONNX file is compared with torch


def write_trained(job, out, onnx=False, as_member=False, coco=False):
    """Export a finished run to the folder `out` and return it; an earlier export there is replaced.

    onnx: also write ONNX files of the networks, compared with torch on held-out images. as_member: export as a member
    of a blend, without a decision rule. For a blend, its members with a weight are exported. coco: also write the
    submission's boxes as COCO. Raises InputError if a step is missing or stale, if `out` is a file or contains other
    files, if there are no boxes, or if an ONNX file differs from its network.
    """
    recipe, run, out = job.recipe, job.run, Path(out)
    if onnx:
        require_extra("onnx", "--onnx")
    rule = {} if as_member else read_rule(job)
    score = {} if as_member or run.step("refit") else read_score(job)[recipe.metric]
    if coco:
        require(job, job.steps["submit"])
        boxes = recipe.boxes(job)
        check(boxes, f"--coco: a submission of {recipe.name} has no boxes, or is written as COCO anyway")
    neutral = neutral_of(job)
    clear_export(out)
    networks = {} if job.is_blend else {f"fold{one.fold}-{one.stage}": one for one in predicting_networks(job)}
    sources = {f"{name}.safetensors": one.weights(run) for name, one in networks.items()}
    sources |= recipe.assets(job.config)
    about = {"format": FORMAT, "solution": job.solution, "preset": job.preset, "config": to_dict(job.config)}
    written = [*sources, *(f"{name}.onnx" for name in networks), *[COCO] * coco]
    # an interrupted export is recognised as an export and as incomplete
    write_json(out / ABOUT, {**about, "files": dict.fromkeys(written, ""), "rule": {}, "incomplete": True})
    files = {}
    for name, path in sources.items():
        copy_file(path, out / name)
        files[name] = file_hash(out / name)
    for name, one in networks.items() if onnx else ():
        path = out / f"{name}.onnx"
        if _write_onnx(job, one, path):
            files[path.name] = file_hash(path)
    if coco:
        write_boxes(out / COCO, boxes[0], job.images.at(job.images.rows("test")), boxes[1])
        files[COCO] = file_hash(out / COCO)
    if job.is_blend:
        about |= _write_members(job, out, files, onnx)
    about |= {"git": run.manifest.get("git", ""), "packages": run.manifest.get("packages", {})}
    about["synthetic"] = run.step("prepare")["synthetic"]
    # without the folders' names, which reveal more about a machine than a published folder should
    words = run.manifest.get("command", "").split()
    about["command"] = " ".join(re.sub(r"[^\s=]*/(?=[^/])", "", word) for word in words)
    about |= {"score": {"metric": recipe.metric, **score}, "files": files, "neutral": neutral, "rule": rule}
    about |= {"facts": job.images.about, "taught": describe_lessons(run)}
    write_json(out / ABOUT, about)
    return out


def _write_members(job, out, files, onnx):
    """Write the exports of a blend's members to `out`, their hashes to `files`; return `members` and `mixing`."""
    found, mixing = {}, mixing_of(job)
    folders = zip(mixing.pop("folders").items(), mixing.pop("keys"), strict=True)
    for number, ((name, folder), key) in enumerate(folders):
        prefix = f"{number}-"
        with open_run(job.recipe, type(job.config), folder, device="cpu") as member:
            predicted = f"{folder}: its predictions have changed since it was blended; run `blend` again"
            check((member.run.step("predict") or {}).get("key") == key, predicted)
            with tempfile.TemporaryDirectory(dir=out) as temporary:
                about = found[str(number)] = read_json(write_trained(member, temporary, onnx, True) / ABOUT)
                for each in about["files"]:
                    shutil.move(Path(temporary, each), out / f"{prefix}{each}")
            for suffix, table in read_predictions(member, "oof").tables.items() if mixing["average"] == "rank" else ():
                path = out / f"{prefix}oof{suffix}.parquet"
                write_table(path, table[value_columns(table)])
                about["files"][f"oof{suffix}.parquet"] = file_hash(path)
        files |= {f"{prefix}{each}": sha256 for each, sha256 in about["files"].items()}
        log.info(f"{name}: exported as member {number}")
    return {"members": found, "mixing": mixing}


def _write_onnx(job, network, path):
    """Write a trained Network as an ONNX file and return whether it has one; detectors do not."""
    model = network.load(job.run)
    if isinstance(model, Detector):
        log.info(f"{path}: not written, since an ONNX file here cannot return a varying number of boxes")
        return False
    rows, held_out = network.rows(job, network.fold)
    data = network.dataset(job, (held_out if len(held_out) else rows)[:CHECKED], False, False)
    write_onnx(path, model, torch.stack([data[i][0] for i in range(len(data))]))
    return True


# ---- tools ---------------------------------------------------------------------------------------------------------


def export_tool(recipe, config_class):
    """Return the tool `export` of a solution."""

    def export(run: Path, /, *, out: Path, onnx: bool = False, coco: bool = False):
        """Export the weights and the decision rule of a finished run as one flat folder, from which `infer` predicts.

        It holds weights, configuration, decision rule and their hashes; the run and its images are not needed again.

        Args:
            run: Folder of the run.
            out: Folder for the files.
            onnx: Also write the networks as ONNX files, with which `infer` is often faster on a CPU.
            coco: Also write the boxes of the run's submission as a COCO file, submission.coco.json.
        """
        with open_run(recipe, config_class, run) as job:
            write_trained(job, out, onnx, coco=coco)
        files = [path for path in sorted(out.iterdir()) if path.suffix in (".safetensors", ".onnx")]
        log.info(f"{out}: {len(files)} files of weights, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
        return 0

    return export


def infer_tool(recipe, config_class, takes_sizes=False, hide_sizes=False):
    """Return the tool `infer` of a solution; takes_sizes: whether --sizes applies; hide_sizes: hide it in --help."""
    Sizes = tyro.conf.Suppress[tuple[Path, ...]] if hide_sizes else tuple[Path, ...]

    def infer(
        trained: Path,
        /,
        *,
        data: Path | None = None,
        test: Path | None = None,
        out: Path | None = None,
        work: Path | None = None,
        sizes: Sizes = (),
        on_bad_image: Literal["error", "placeholder"] = "error",
        device: str = "auto",
        workers: int | None = None,
    ):
        """Predict test images from an exported folder and write a submission; no labels and no run are needed.

        Args:
            trained: Folder written by `export`, folder of a finished run, or hf://you/name on the Hugging Face hub.
            data: The competition's folder, whose sample submission names the images; found automatically on Kaggle.
            test: Images to predict instead: a folder, or a CSV whose first column names them.
            out: The submission (default: submission.csv, on Kaggle in /kaggle/working).
            work: Folder for decoded images and predictions, from which an interrupted call continues; by default a
                temporary folder that is deleted at the end.
            sizes: CSV files with width and height of the originals, for resized copies of the images.
            on_bad_image: placeholder: an image that cannot be read gets the neutral prediction.
            device: auto, cpu, cuda or cuda:<n>.
            workers: Processes that read images (default: one per core).
        """
        check(not sizes or takes_sizes, f"--sizes does not apply to {recipe.name}")
        with ExitStack() as stack:
            if (trained / "config.json").is_file():
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="export-"))
                with open_run(recipe, config_class, trained, device=device) as job:
                    trained = write_trained(job, folder)
            repo = repo_of(trained)
            exported = Trained.open(fetch(repo) if repo else trained, recipe.name)
            out = out or (WORKING if WORKING.is_dir() else Path()) / "submission.csv"
            check(not out.is_dir(), f"--out {out}: a folder; name the submission's file")
            inputs = [path.resolve() for path in (test, *sizes) if path is not None]
            check(out.resolve() not in inputs, f"--out {out}: is an input, which would be overwritten")
            check_device(device)
            device = str(distributed.start(device))  # under torchrun, all processes share the images
            given = {"data": data, "test": test, "sizes": sizes, "device": device, "workers": workers}
            folder = stack.enter_context(_work_folder(work))
            options = Options(out=folder, store=folder / "stores", on_bad_image=on_bad_image, **given)
            job = stack.enter_context(_exported_job(recipe, config_class, exported, options))
            images = _predict_exported(job, exported, config_class)
            if not processes.is_main():
                return 0
            log.info(f"valid submission: {write_answer(job, exported.rule, exported.neutral, out)}")
            return max(job.left_out, int((~images.table["ok"]).sum()))

    return infer


def _exported_job(recipe, config_class, exported, options):
    config = from_dict(config_class, exported.config, str(exported.folder / ABOUT))
    config = recipe.use_assets(config, {name: exported.file(name) for name in exported.files})
    return open_job(recipe, exported.preset, config, options, facts=exported.facts)


def _predict_exported(job, exported, config_class):
    """Predict test images with an export's networks (for a blend, mix its members' predictions); return the Images."""
    images = job.images = processes.ask_main(lambda: prepare_test(job))
    if not exported.members:
        processes.ask_main(lambda: exported.link(job.run))
        predict_test(job)
        return images
    members, ids = [], job.images.ids(job.images.rows("test"))
    for name, (number, one) in zip(exported.mixing["runs"], exported.members.items(), strict=True):
        options = replace(job.options, out=job.options.out / f"member{number}")
        with _exported_job(job.recipe, config_class, one, options) as member:
            _predict_exported(member, one, config_class)
            if processes.is_main():
                tables = {s: one.file(f"oof{s}.parquet") for s in job.recipe.suffixes(job.config)}
                known = Predicted(None, {s: read_parquet(path) for s, path in tables.items() if path.is_file()})
                predicted = {"test": read_predictions(member, "test"), "oof": known}
                members.append(Member(name, member, predicted, list(ids)))
    processes.ask_main(lambda: write_mixed(job, members, "test", exported.mixing))
    return images


@contextmanager
def _work_folder(folder):
    """Yield the working folder: the user's, which must not be a run or an export, or a temporary one."""
    if folder is None:
        temporary = processes.ask_main(lambda: tempfile.mkdtemp(prefix="infer-"))
        try:
            yield Path(temporary)
            processes.gather(None)  # all processes are done with it
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return
    if (folder / "config.json").exists() or (folder / ABOUT).exists():
        raise InputError(f"--work {folder}: is a run or an exported folder; name another")
    yield folder
