"""DICOM files for tests."""

import warnings

import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit

from common.data import dicom

GDCM = ("JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless")  # transfer syntaxes


def picture(bits=12, signed=0, shape=(23, 18)):
    """Return a noisy ramp over the full range of `bits`, in the smallest integer type."""
    ramp = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) / (sum(shape) - 2)
    noise = np.random.default_rng(bits).integers(-3, 4, shape)
    values = np.clip(ramp * (2**bits - 1) + noise, 0, 2**bits - 1).astype(np.int64) - signed * 2 ** (bits - 1)
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def dataset(pixels, stored=None, syntax=ExplicitVRLittleEndian, data=None, **elements):
    """Return a Dataset of pixels (H, W) or (H, W, 3); data: the encoded stream of a compressed one."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = pixels.itemsize * 8
    ds.BitsStored = stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    payload = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    ds.PixelData = encapsulate([data]) if data else payload + b"\0" * (len(payload) % 2)
    ds["PixelData"].VR = "OB" if data or ds.BitsAllocated == 8 else "OW"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in elements.items():
            setattr(ds, name, value)
    return ds


def save(ds, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
    return path


def read_pixels(path):
    """Return a file's stored values as the product reads them. Raises InputError as `read_image` does."""
    with dicom._name_errors(path):
        return dicom._read_dicom(path)[0]


def deadly(path):
    """Write a file on which gdcm ends its process: a JPEG of 8 bits whose header names 7."""
    pixels = picture(8)
    return save(dataset(pixels, 7, JPEGBaseline8Bit, cv2.imencode(".jpg", pixels)[1].tobytes()), path)


def recode(source, target, name):
    """Let gdcm write `source` in the transfer syntax that it calls `name`."""
    gdcm = pytest.importorskip("gdcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target
