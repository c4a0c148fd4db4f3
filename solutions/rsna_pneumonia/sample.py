"""The embedded sample: phantom radiographs in the file layout of the RSNA challenge.

Like the real data: 1024 × 1024 8-bit DICOM named by patient, one to three boxes of opacities with a label row each, and
both healthy images and images with other findings. Unlike them: half of the images have an opacity instead of 22 %.
"""

from functools import partial

import numpy as np

from common import phantom
from common.phantom import findings as draws
from common.phantom.sample import in_threads, make_uuid, nih_dicom, write_dicom, write_rows, write_sample
from solutions.rsna_pneumonia.config import CLASS_INFO, CLASSES, LABELS, SAMPLE, SAMPLE_FILE, SIDE

VERSION = 2  # raise it whenever the files for a seed change
OPACITIES = [partial(draws.consolidation, density=density, radius=(0.11, 0.16)) for density in (0.26, 0.32)]
OTHERS = (draws.cardiomegaly, draws.effusion, draws.nodule, draws.pleural_thickening, draws.fibrosis)
RAW = 12  # every 12th image is stored uncompressed


def make_sample(folder, n_train=64, n_test=12, seed=0):
    """Write the sample into `folder` and return it as a Path; a complete sample with the same parameters is reused.

    Besides the challenge's files, it has hidden/truth.csv: the test images' boxes in the format of the labels.
    """
    return write_sample(folder, "rsna_pneumonia", VERSION, _write, n_train=n_train, n_test=n_test, seed=seed)


def _write(folder, n_train, n_test, seed):
    train, test = ([(split, seed, k) for k in range(n)] for split, n in (("train", n_train), ("test", n_test)))
    written = in_threads(partial(_write_image, folder), [*train, *test])
    for name, images in ((LABELS, written[:n_train]), ("hidden/truth.csv", written[n_train:])):
        rows = [(image_id, *box, kind // 2) for image_id, kind, boxes in images for box in boxes or [("",) * 4]]
        write_rows(folder / name, [("patientId", "x", "y", "width", "height", "Target"), *rows])
    classes = [(image_id, CLASSES[kind]) for image_id, kind, boxes in written[:n_train] for _ in boxes or [None]]
    write_rows(folder / CLASS_INFO, [("patientId", "class"), *classes])
    write_rows(folder / SAMPLE_FILE, [SAMPLE, *((image_id, "0.5 0 0 100 100") for image_id, *_ in written[n_train:])])


def _write_image(folder, case):
    """Draw and write one image; return its id, its index in CLASSES, and its boxes as x, y, width, height."""
    split, seed, k = case
    number, kind = 1_000_000 * seed + 500_000 * (split == "test") + k, (2, 0, 2, 1)[k % 4]
    rng = np.random.default_rng([number, 1])
    ways = [rng.choice(OTHERS)] if kind == 1 else rng.choice(OPACITIES, rng.choice(3, p=(0.4, 0.5, 0.1)) + 1)
    film = phantom.draw(number, SIDE, ways if kind else ())
    image_id, *uids = (make_uuid("rsna_pneumonia sample", number, level) for level in range(4))
    dataset = nih_dicom(film.image, *(f"2.25.{uid.int}" for uid in uids), str(image_id), "AP", rng, k % RAW == RAW - 1)
    write_dicom(folder / f"stage_2_{split}_images" / f"{image_id}.dcm", dataset)
    corners = [np.array(finding.box, float) for finding in film.findings if kind == 2]
    return image_id, kind, [(*box[:2].tolist(), *(box[2:] - box[:2]).tolist()) for box in corners]
