"""On Kaggle: what a bundle holds, and where notebooks read and write."""

import os
import tempfile
from pathlib import Path

from common.errors import InputError
from common.kaggle.bundle import FORMAT, LISTING
from common.paths import read_json

WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))


def trained_folder(bundle, run, solution=None):
    """The trained folder of one run of a bundle: links under the files' own names, in a temporary folder.

    Raises InputError where the bundle has no such run, or it is of another solution, or files are missing.
    """
    bundle = Path(bundle)
    about = read_json(bundle / LISTING)
    if about.get("format") != FORMAT:
        raise InputError(f"{bundle / LISTING}: not of format {FORMAT}, which this program reads")
    if run not in about["runs"]:
        raise InputError(f"{bundle}: has no run {run}, but {', '.join(about['runs'])}")
    entry = about["runs"][run]
    if solution is not None and entry["solution"] != solution:
        raise InputError(f"{bundle}: {run} is a run of {entry['solution']}, not of {solution}")
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    for name, flat in entry["files"].items():
        if not (bundle / flat).is_file():
            raise InputError(f"{bundle / flat}: missing; upload the bundle again")
        (folder / name).symlink_to((bundle / flat).resolve())
    return folder


def images_of(source, ids, size=None, markers=None):
    """These test images of the mounted competition, by id, uint8 (H, W); squares of `size` where it is given.

    markers: names of the files by which the folder is known (default: the sample submission's).
    """
    import cv2

    from common.data.dicom import read_image
    from common.infer.tools import find_marker
    from common.paths import find_images

    files = find_images(find_marker(None, source, markers or source.samples).parent)
    images = {image_id: read_image(files[image_id]) for image_id in ids}
    if size is not None:
        images = {name: cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for name, image in images.items()}
    return images


def display(items, overlay=None):
    """Show pictures in the notebook; items and overlay as in common.report.gallery."""
    from IPython.display import HTML
    from IPython.display import display as show

    from common.report.gallery import gallery, outline_overlay

    show(HTML(str(gallery(items, overlay=overlay or outline_overlay))))
