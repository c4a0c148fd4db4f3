"""DICOM files of phantom radiographs."""

import cv2
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit


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
