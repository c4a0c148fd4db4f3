"""What embedded samples share: the folder, written atomically, kept while its parameters are unchanged, and files."""

import csv
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit

from common import paths
from common.errors import InputError

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def write_sample(folder, parameters, least, write):
    """Fill a temporary folder by `write(path)`, rename it to `folder` and return that as a Path.

    parameters: all that the files depend on, stored in sample.json: `sample` (the solution), `version`, and integers
    whose minima `least` gives. A complete sample of equal parameters is kept, any other replaced. Raises InputError for
    a number out of range and for a folder that holds other files.
    """
    for name, smallest in least.items():
        if not isinstance(parameters[name], int) or parameters[name] < smallest:
            raise InputError(f"sample: {name}={parameters[name]!r} must be a whole number of at least {smallest}")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        known = paths.read_json(folder / "sample.json") if (folder / "sample.json").is_file() else {}
        if not isinstance(known, dict) or known.get("sample") != parameters["sample"]:
            raise InputError(f"{folder}: holds something other than a sample of {parameters['sample']}; name another")
        if known == parameters:
            return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
        new, stale = Path(temporary, "new"), Path(temporary, "stale")
        write(new)
        paths.write_json(new / "sample.json", parameters)
        if folder.exists():
            os.rename(folder, stale)
        os.rename(new, folder)
    return folder


def in_threads(function, *columns):
    """Return the results of a function of several columns, in threads: drawing and coding release the lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *columns))


def write_rows(path, rows):
    """Write the rows of a CSV file, header included, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def nih_dicom(image, study, series, image_id, patient_id, view, person, raw=False):
    """Return the DICOM of a radiograph, uint8 (H, W), as SIIM and RSNA wrote those of NIH: JPEG unless `raw`.

    study, series, image_id: UIDs. view: AP or PA. person: random generator of the patient's sex and age.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if raw else JPEGBaseline8Bit
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, image_id
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.Modality, dataset.BodyPartExamined = "CR", "CHEST"
    dataset.ViewPosition = view
    dataset.PatientName, dataset.PatientID = "", patient_id
    dataset.PatientSex = "FM"[person.integers(2)]
    # the real files lack the unit that the standard requires, which pydicom would refuse to write
    age = DataElement("PatientAge", "AS", str(person.integers(18, 90)), validation_mode=pydicom.config.IGNORE)
    dataset.add(age)
    dataset.PixelSpacing = [0.143, 0.143]
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PixelData = image.tobytes()
    if dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit:
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        dataset.PixelData = encapsulate([jpeg.tobytes()])
        dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", "ISO_10918_1"
    dataset["PixelData"].VR = "OB"
    return dataset
