"""What embedded samples share: the folder, written atomically, kept while its parameters are unchanged, and files."""

import csv
import os
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, JPEGBaseline8Bit

from common import paths, processes
from common.errors import InputError

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


LEAST = {"n_train": 4, "n_test": 1, "seed": 0}  # minima of the parameters of most samples


def write_sample(folder, solution, version, write, least=LEAST, **parameters):
    """Fill a temporary folder by `write(path, **parameters)`, rename it to `folder` and return that as a Path.

    least: the minima of the parameters that are whole numbers, by name. All that the files depend on is stored in
    sample.json. A complete sample of equal parameters is kept, any other replaced. Raises InputError for a number out
    of range and for a folder that holds other files.
    """
    for name, smallest in least.items():
        if not isinstance(parameters[name], int) or parameters[name] < smallest:
            raise InputError(f"sample: {name}={parameters[name]!r} must be a whole number of at least {smallest}")
    folder, wanted = Path(folder), {"sample": solution, "version": version, **parameters}
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        known = paths.read_json(folder / "sample.json") if (folder / "sample.json").is_file() else {}
        if not isinstance(known, dict) or known.get("sample") != solution:
            raise InputError(f"{folder}: holds something other than a sample of {solution}; name another")
        if known == wanted:
            return folder
    paths.make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
        new, stale = Path(temporary, "new"), Path(temporary, "stale")
        write(new, **parameters)
        paths.write_json(new / "sample.json", wanted)
        if folder.exists():
            os.rename(folder, stale)
        os.rename(new, folder)
    return folder


def in_threads(function, *columns):
    """Return the results of a function of several columns, in threads: drawing and coding release the lock."""
    with ThreadPoolExecutor(processes.cores()) as pool:
        return list(pool.map(function, *columns))


def write_rows(path, rows, header="", end="\r\n"):
    """Write a CSV file and its folder: the header as it stands, if it is not the first of the rows, then the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.write(header and header + end)
        csv.writer(file, lineterminator=end).writerows(rows)


def crop(starts, sides, size):
    """Return slices of these sides that begin as near to `starts` as an image of `size` pixels allows."""
    starts = [min(max(start, 0), size - side) for start, side in zip(starts, sides, strict=True)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


def draw_visits(rng, count):
    """Return the visit number of each of `count` images: half of the patients have one image, some two to four."""
    visits = []
    while len(visits) < count:
        visits += range(rng.choice(4, p=(0.5, 0.25, 0.15, 0.1)) + 1)
    return visits[:count]


def draw_findings(rng, count, names, healthy, least, most):
    """Return the findings of `count` images, tuples of `names` in their order, all of them equally often.

    `healthy` images, at random places, have none; the others have `least` to `most`, in turn.
    """
    ill = rng.permutation(count) >= healthy
    seen, found = np.zeros(len(names)), []
    for i in range(count):
        number = least + ill[:i].sum() % (most - least + 1)
        rarest = np.sort(np.argsort(seen + rng.random(len(seen)))[:number]) if ill[i] else []
        seen[rarest] += 1
        found.append(tuple(names[k] for k in rarest))
    return found


def make_dicom(levels, image_id, sex, age, bits=8):
    """Return a DICOM of grey levels, unsigned (H, W), not compressed; image_id: a UID; age: text, also not standard."""
    dataset = Dataset()
    dataset.set_pixel_data(levels, "MONOCHROME2", bits, generate_instance_uid=False)
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, image_id
    dataset.PatientSex = sex
    dataset.add(DataElement("PatientAge", "AS", age, validation_mode=pydicom.config.IGNORE))
    return dataset


def write_dicom(path, dataset):
    """Write a DICOM file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def make_uuid(*words):
    """Return the UUID that belongs to some words or numbers; as a UID, its number follows the root 2.25."""
    return uuid.uuid5(uuid.NAMESPACE_OID, " ".join(map(str, words)))


def nih_dicom(image, study, series, image_id, patient_id, view, person, raw=False):
    """Return the DICOM of a radiograph, uint8 (H, W), as SIIM and RSNA wrote those of NIH: JPEG unless `raw`.

    study, series, image_id: UIDs. view: AP or PA. person: random generator of the patient's sex and age.
    """
    sex, age = "FM"[person.integers(2)], str(person.integers(18, 90))  # without a unit, as in the real files
    dataset = make_dicom(image, image_id, sex, age)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.Modality, dataset.BodyPartExamined = "CR", "CHEST"
    dataset.ViewPosition = view
    dataset.PatientName, dataset.PatientID = "", patient_id
    dataset.PixelSpacing = [0.143, 0.143]
    if not raw:
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        dataset.PixelData = encapsulate([jpeg.tobytes()])
        dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", "ISO_10918_1"
    return dataset
