"""`bundle`: the wheels it carries, the folder it is, and its upload with the real client."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from common.config import file_hash
from common.errors import InputError
from common.kaggle import bundle, wheels
from common.kaggle.bundle import LISTING, write_bundle
from common.kaggle.session import open_bundle
from common.kaggle.wheels import Image, build_wheel, fetch_wheels, own_requirements
from common.paths import read_json, write_json
from common.trained import Trained

IMAGE = Image("2026-01", "3.12", {"torch": "2.6", "numpy": "2.0.2"})


# ---- wheels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A checkout of two small packages."""
    folder = tmp_path / "root"
    for name in ("common", "solutions"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(wheels.ROOT / name, folder / name)
    (folder / "requirements.txt").write_text("numpy>=1.26  # arrays\n")
    return folder


def test_our_wheel_holds_all_of_ours_and_the_lung_weights(tmp_path):
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        needs = archive.read("cxr_solutions-0.1.0.dist-info/METADATA").decode()
    paths = [path for package in ("common", "solutions") for path in (wheels.ROOT / package).rglob("*")]
    ours = {str(path.relative_to(wheels.ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in ours - names if not name.endswith(".md")} == set() and names <= ours
    assert "solutions/lung_segmentation/weights/lungs.safetensors" in names and "Requires-Dist: torch>=2.6" in needs
    with pytest.raises(InputError, match="made from a checkout"):
        build_wheel(tmp_path, tmp_path)


def test_the_same_sources_give_the_same_wheel(root, tmp_path):
    first = build_wheel(tmp_path, root).read_bytes()
    (root / "build" / "lib" / "common").mkdir(parents=True)
    (root / "build" / "lib" / "common" / "old.py").write_text("what an earlier build left behind")
    (root / "common" / "__pycache__").mkdir()
    (root / "common" / "__pycache__" / "old.pyc").write_bytes(b"")
    (root / "common" / "__init__.py").chmod(0o600)
    os.utime(root / "common" / "__init__.py", (0, 0))
    assert build_wheel(tmp_path, root).read_bytes() == first


@pytest.fixture
def index(tmp_path, monkeypatch):
    """`index(name, version, *needs)` adds a wheel; pip finds these and no others."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def add(name, version, *needs, tag="py3-none-any"):
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {n}" for n in needs)]
        with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
            archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")
            archive.writestr(f"{name}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
            archive.writestr(f"{name}-{version}.dist-info/RECORD", "")

    return add


def fetch(folder, *lines, python="3.12"):
    """Names of the fetched wheels' files, and what was left to the image."""
    folder.mkdir(exist_ok=True)
    left = fetch_wheels(folder, python, [Requirement(line) for line in lines], IMAGE)
    return sorted(path.name for path in folder.iterdir()), left


def test_wheels_of_what_the_image_lacks_and_of_what_that_needs(index, tmp_path):
    index("a", "1.0", "b>=2", "numpy>=1.20", "torch", "no_such; extra == 'more'", "kaggle")
    index("b", "2.0", "c; python_version < '3.12'", "no_such; sys_platform == 'win32'", "a")
    index("b", "1.0")
    index("c", "1.0", tag="cp311-cp311-manylinux_2_27_x86_64")
    index("numpy", "2.5")
    index("d", "1.0", tag="cp311-cp311-manylinux2014_x86_64")
    index("d", "0.9", tag="cp312-cp312-manylinux2014_x86_64")
    found, left = fetch(tmp_path / "to", "a", "torch>=2", "kaggle>=9", "d")
    assert found == ["a-1.0-py3-none-any.whl", "b-2.0-py3-none-any.whl", "d-0.9-cp312-cp312-manylinux2014_x86_64.whl"]
    assert left == ["numpy", "torch"]
    found, left = fetch(tmp_path / "to311", "a", python="3.11")
    assert found[1:] == ["b-2.0-py3-none-any.whl", "c-1.0-cp311-cp311-manylinux_2_27_x86_64.whl"]
    # too old in the image: then it is carried
    assert fetch(tmp_path / "newer", "numpy>=2.1") == (["numpy-2.5-py3-none-any.whl"], [])


def test_wheels_that_cannot_be_had(index, tmp_path, monkeypatch):
    index("a", "1.0", "b<2")
    index("b", "1.0")
    index("b", "3.0")
    with pytest.raises(InputError, match=r"^b: 3.0 is in the bundle, but b<2 is needed as well$"):
        fetch(tmp_path / "to", "a", "b")
    with pytest.raises(InputError, match=r"^the notebook's image has torch 2.6, but torch>=2.7 is needed$"):
        fetch(tmp_path / "to", "torch>=2.7")
    with pytest.raises(InputError, match=r"^no wheels for Python 3.12: .*no-such"):
        fetch(tmp_path / "to", "no-such>=1")
    monkeypatch.delenv("PIP_NO_INDEX")
    settings = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "NO_PROXY": "*", "PIP_EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"3.12: the package index cannot be reached; is there internet here\?$"):
        fetch(tmp_path / "to", "no-such>=1")


def test_the_image_lacks_what_the_program_starts_with():
    names = {requirement.name for requirement in own_requirements()}
    assert {"torch", "tyro", "imagehash", "segmentation-models-pytorch"} <= names
    assert next(iter(wheels.IMAGE.packages)) == "torch"
    lacking = names - set(wheels.IMAGE.packages) - set(wheels.UNUSED)
    assert {"tyro", "imagehash"} <= lacking and not {"torch", "numpy", "pandas"} & lacking
    for requirement in own_requirements():  # what the image has is new enough, else it would be carried, torch never
        if requirement.name in wheels.IMAGE.packages and requirement.name not in wheels.UNUSED:
            assert requirement.specifier.contains(wheels.IMAGE.packages[requirement.name]), requirement


# ---- the folder ----------------------------------------------------------------------------------------------------


def trained(folder, solution="siim_pneumothorax", **weights):
    """A trained folder with files of these contents."""
    folder.mkdir(parents=True)
    files = {}
    for name, content in (weights or {"fold0-segmenter-64": b"weights"}).items():
        (folder / f"{name}.safetensors").write_bytes(content)
        files[f"{name}.safetensors"] = file_hash(folder / f"{name}.safetensors")
    about = {"format": 1, "solution": solution, "preset": "demo", "config": {}, "git": "", "packages": {}}
    score = {"metric": "dice", "estimate": 0.5, "low": 0.4, "high": 0.6}
    write_json(folder / "trained.json", about | {"score": score, "files": files, "neutral": "-1", "rule": {}})
    return folder


@pytest.fixture
def quick(monkeypatch):
    """No pip: our wheel and one of another package are a few bytes."""

    def build(folder):
        path = Path(folder) / "cxr_solutions-0.1.0-py3-none-any.whl"
        path.write_bytes(b"ours")
        return path

    def fetch(folder, python, requirements):
        (Path(folder) / f"tyro-1.0-cp{python.replace('.', '')}-none-any.whl").write_bytes(b"theirs")
        return ["numpy", "torch"]

    monkeypatch.setattr(bundle, "build_wheel", build)
    monkeypatch.setattr(bundle, "fetch_wheels", fetch)
    monkeypatch.setattr(bundle, "git_revision", lambda: "0123456789ab")


def no_run(*words):
    raise AssertionError("a trained folder is taken as it is")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_is_flat_and_tells_what_it_holds(quick, tmp_path):
    one, two = trained(tmp_path / "siim-1"), trained(tmp_path / "x" / "nih-1", "chestxray14", **{"lungs": b"lungs"})
    out = tmp_path / "bundle"
    about = write_bundle([one, two], out, no_run, "3.12")
    files = ["nih-1--lungs.safetensors", "nih-1--trained.json", "siim-1--fold0-segmenter-64.safetensors"]
    files += ["siim-1--trained.json", "cxr_solutions-0.1.0-py3-none-any.whl", "tyro-1.0-cp312-none-any.whl"]
    assert set(contents(out)) == {*files, LISTING, "dataset-metadata.json"} and set(about["files"]) == set(files)
    assert read_json(out / LISTING) == about
    for name, entry in about["files"].items():
        assert entry == {"bytes": (out / name).stat().st_size, "sha256": file_hash(out / name)}
    assert (about["python"], about["image"], about["git"]) == ("3.12", wheels.IMAGE.date, "0123456789ab")
    assert about["excluded"] == {name: wheels.IMAGE.packages[name] for name in ("numpy", "torch")}
    assert about["runs"]["nih-1"]["solution"] == "chestxray14"
    assert about["runs"]["siim-1"]["score"] == {"metric": "dice", "estimate": 0.5, "low": 0.4, "high": 0.6}
    metadata = {"title": "chest xray bundle", "id": "OWNER/chest-xray-bundle", "licenses": [{"name": "other"}]}
    assert read_json(out / "dataset-metadata.json") == metadata
    assert not list(tmp_path.glob(".*"))
    # and on Kaggle a run of it is a trained folder again
    found = Trained.open(open_bundle(out, "siim-1"), "siim_pneumothorax")
    assert (found.folder / "fold0-segmenter-64.safetensors").read_bytes() == b"weights"
    assert (Trained.open(open_bundle(out, "nih-1")).folder / "lungs.safetensors").read_bytes() == b"lungs"
    with pytest.raises(InputError, match="has no run siim-2, but siim-1, nih-1"):
        open_bundle(out, "siim-2")
    (out / "nih-1--lungs.safetensors").write_bytes(b"spoilt")
    with pytest.raises(InputError, match=r"lungs.safetensors: not the file that was exported"):
        Trained.open(open_bundle(out, "nih-1"))
    (out / "nih-1--lungs.safetensors").unlink()
    with pytest.raises(InputError, match=r"nih-1--lungs.safetensors: missing"):
        open_bundle(out, "nih-1")


def test_the_same_runs_give_the_same_bundle(quick, tmp_path):
    run = trained(tmp_path / "siim-1")
    for name in ("a", "b", "b"):  # the last in place of an earlier one
        write_bundle([run], tmp_path / name, no_run)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_failure_leaves_the_earlier_bundle_and_nothing_else(quick, tmp_path, monkeypatch):
    run, out = trained(tmp_path / "siim-1"), tmp_path / "bundle"
    write_bundle([run], out, no_run)
    before = contents(out)
    (tmp_path / ".bundle.partial" / "bundle").mkdir(parents=True)  # of a call that was killed
    (tmp_path / ".bundle.partial" / "bundle" / "half").write_bytes(b"")

    def broken(*words):
        raise InputError("no internet")

    monkeypatch.setattr(bundle, "fetch_wheels", broken)
    with pytest.raises(InputError, match="no internet"):
        write_bundle([trained(tmp_path / "siim-2")], out, no_run)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "siim-1", "siim-2"]


def test_a_kill_between_the_two_renames_loses_no_bundle(quick, tmp_path, monkeypatch):
    run, out = trained(tmp_path / "siim-1"), tmp_path / "bundle"
    write_bundle([run], out, no_run)
    before, partial = contents(out), tmp_path / ".bundle.partial"
    partial.mkdir()
    out.rename(partial / "earlier")
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(bundle, "fetch_wheels", no_run)  # and the next call fails
        write_bundle([run], out, no_run)
    assert contents(out) == before and not partial.exists()
    (partial / "earlier").mkdir(parents=True)  # of a call that was killed while it deleted the earlier bundle
    (partial / "earlier" / "half").write_bytes(b"")
    write_bundle([run], out, no_run)
    assert contents(out) == before and not partial.exists()
    partial.mkdir()
    (partial / "mine.txt").write_text("no bundle of ours was made here")
    with pytest.raises(InputError, match=r"holds mine\.txt, which is not part of a bundle"):
        write_bundle([run], out, no_run)
    assert contents(out) == before and (partial / "mine.txt").exists()


RUN = {"solution": "siim_pneumothorax", "files": {"trained.json": "r--trained.json"}}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"runs": {"r": RUN | {"files": {"/tmp/evil.py": "r--trained.json"}}}}, "'/tmp/evil.py' cannot be part of"),
        ({"runs": {"r": RUN | {"files": {"../evil.py": "r--trained.json"}}}}, "'../evil.py' cannot be part of"),
        ({"runs": {"r": RUN | {"files": {"a": "../../etc/passwd"}}}}, "'../../etc/passwd' cannot be part of"),
        ({"runs": {"r": RUN | {"files": {"..": "a"}}}}, "'..' cannot be part of"),
        ({"runs": {"r": RUN | {"files": {"a\nb": "a"}}}}, r"'a\\nb' cannot be part of"),
        ({"runs": {"r": RUN | {"files": {"a": 1}}}}, "1 cannot be part of"),
        ({"runs": {"r": RUN, "../r": RUN}}, "'../r' cannot be part of"),
        ({"runs": {"r": {"files": {}}}}, "damaged"),
        ({"runs": {"r": RUN | {"files": [1]}}}, "damaged"),
        ({"runs": {"r": []}}, "damaged"),
        ({"runs": [RUN]}, "damaged"),
        ({"format": 2}, "not of format 1"),
    ],
)
def test_names_in_a_listing_lead_nowhere(tmp_path, monkeypatch, change, reason):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "r--trained.json").write_text("{}")
    listing = {"format": 1, "runs": {"r": RUN}}
    write_json(tmp_path / LISTING, listing)
    assert [path.name for path in open_bundle(tmp_path, "r").iterdir()] == ["trained.json"]
    before = sorted(tmp_path.rglob("*"))
    write_json(tmp_path / LISTING, listing | change)
    with pytest.raises(InputError, match=reason) as caught:
        open_bundle(tmp_path, "r")
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "", '{"files": 5}', '{"files": ["a"]}', '{"files": null}'])
def test_a_damaged_listing_is_one_line_and_removes_nothing(quick, tmp_path, text):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / LISTING).write_text(text)
    (tmp_path / "bundle" / "mine.txt").write_text("")
    with pytest.raises(InputError, match=r"not a JSON file|holds mine\.txt"):
        write_bundle([], tmp_path / "bundle", no_run)
    with pytest.raises(InputError, match=r"not a JSON file|not of format 1"):
        open_bundle(tmp_path / "bundle", "r")
    assert set(contents(tmp_path / "bundle")) == {LISTING, "mine.txt"}


def test_what_cannot_be_bundled(quick, tmp_path):
    run, out = trained(tmp_path / "siim-1"), tmp_path / "bundle"
    with pytest.raises(InputError, match="a second run named siim-1"):
        write_bundle([run, trained(tmp_path / "x" / "siim-1")], out, no_run)
    with pytest.raises(InputError, match="'my run' cannot be part of file names"):
        write_bundle([trained(tmp_path / "my run")], out, no_run)
    for text in (None, "[]", "{}", '{"solution": 5}'):
        if text:
            (tmp_path / "x" / "config.json").write_text(text)
        with pytest.raises(InputError, match="neither a run nor a trained folder"):
            write_bundle([tmp_path / "x"], out, no_run)
    (run / "fold0-segmenter-64.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="not the file that was exported"):
        write_bundle([run], out, no_run)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("")
    with pytest.raises(InputError, match="holds other files"):
        write_bundle([run], out, no_run)
    assert contents(out) == {"mine.txt": b""}


def test_kaggles_limits(quick, tmp_path, monkeypatch):
    run, out = trained(tmp_path / "siim-1"), tmp_path / "bundle"
    monkeypatch.setattr(bundle, "DATASET_LIMIT", 100)
    with pytest.raises(InputError, match=r"^the bundle has 0.00 GB, Kaggle takes 1e-07 GB: bundle fewer runs"):
        write_bundle([run], out, no_run)
    assert not out.exists() and (bundle.OUTPUT_LIMIT, bundle.DATASET_LIMIT) == (20e9, 100)


# ---- upload --------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(quick, home, tmp_path):
    trained(tmp_path / "work" / "siim-1")
    return ("bundle", "siim-1", "--out", "bundle", "--upload", "chest/my-bundle")


def test_upload_makes_a_dataset_and_then_versions(server, command, refused, words, tmp_path):
    status, said, _ = command(*words)
    assert status == 0 and "uploading a new dataset" in said and "datasets/chest/my-bundle" in said
    held = contents(tmp_path / "work" / "bundle")
    held.pop("dataset-metadata.json")
    assert server.created["chest/my-bundle"]["files"] == held
    assert server.created["chest/my-bundle"]["asked"]["isPrivate"] is True
    status, said, _ = command(*words)
    assert status == 0 and "uploading a new version" in said
    assert server.created["chest/my-bundle"]["version"] == 2
    server.refuse("GetDatasetStatus", 401, "Unauthenticated")
    assert "does not accept the credentials" in refused(*words)
    server.refuse("CreateDatasetVersion", 403, "Permission 'datasets.update' was denied")
    assert "dataset chest/my-bundle: not allowed (Permission 'datasets.update' was denied)" in refused(*words)
    assert "not a dataset's name" in refused(*words[:-1], "my-bundle")
    assert "not a dataset's name" in refused(*words[:-1], "chest/five5")


def test_an_interrupted_upload_continues_and_no_file_is_left_out(server, command, refused, words):
    server.refuse("PUT", 503)  # the client asks how much has arrived
    assert command(*words)[0] == 0
    ranges = [headers.get("Content-Range", "") for headers in server.asked("PUT")]
    assert sum(text.startswith("bytes */") for text in ranges) == 1
    server.refuse("PUT", 403)
    line = refused(*words)
    assert "Kaggle took 4 of 5 files, nothing is published" in line
    assert server.created["chest/my-bundle"]["version"] == 1
    assert command(*words)[0] == 0 and server.created["chest/my-bundle"]["version"] == 2
    server.refuse("CreateDatasetVersion", 429, headers={"Retry-After": "0"}.items())
    assert command(*words)[0] == 0 and server.created["chest/my-bundle"]["version"] == 3
