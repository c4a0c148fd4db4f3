"""Reading radiographs, against pydicom; JPEG 2000 by openjpeg against gdcm, and halved; a store by one process and two.

Run: python -m benchmarks.reading (real SIIM files under CXR_REAL_DATA if there are any, else generated ones).
"""

import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit

from benchmarks.tables import real_data
from common.data.dicom import _read_dicom, read_image, read_image_and_header
from common.data.jpeg import decode_halved
from common.data.store import HEADER, Target, decode_all, to_square


def write_dicom(path, pixels, bits_stored, stream=None, **elements):
    """Write a grey image (H, W), uncompressed or as the baseline JPEG `stream`."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if stream else ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = pixels.itemsize * 8, bits_stored, bits_stored - 1
    ds.PixelData = encapsulate([stream]) if stream else pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def anatomy(shape, top, seed=0):
    """Return a smooth field with film-like noise, from 0 to `top`."""
    y, x = np.mgrid[: shape[0], : shape[1]] / shape[0]
    field = 0.5 + 0.4 * np.sin(6 * x + seed) * np.cos(5 * y) + np.random.default_rng(seed).normal(0, 0.01, shape)
    return (field.clip(0, 1) * top).astype(np.uint16)


def pydicom_pixels(path):
    return pydicom.dcmread(path).pixel_array


def decode_by(plugin, path):
    """Return the pixels as the decoder process of common.data.guard finds them, or by another plugin of pydicom."""
    ds = pydicom.dcmread(path)
    ds.pixel_array_options(decoding_plugin=plugin)
    return ds.pixel_array


def write_jpeg2000(path, pixels, bits_stored, syntax):
    """Write a grey image (H, W) as JPEG 2000, at a ratio of 10 if that loses anything."""
    ds = pydicom.dcmread(write_dicom(path, pixels, bits_stored))
    ds.compress(syntax, **({} if syntax == JPEG2000Lossless else {"j2k_cr": [10]}))
    ds.save_as(path)
    return path


def touched(read):
    """Return `read` with every pixel touched once, because a mapped file is only read then."""

    def read_and_look(path):
        pixels = read(path)
        pixels.max()
        return pixels

    return read_and_look


def usual_chain(path):
    """Return pixels as most notebooks do: modality LUT, VOI LUT in float64, min-max, 8 bits, resize."""
    ds = pydicom.dcmread(path)
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        values = np.amax(values) - values
    values = values - np.min(values)
    image = (values / np.max(values) * 255).astype(np.uint8)
    return cv2.resize(image, (512, 512), interpolation=cv2.INTER_AREA)


def compare(name, goal, ours, peer, paths, rounds, clock=time.perf_counter):
    """Print the ratio of the best times per file, both sides taking turns; their pixels must be equal."""
    for path in paths:
        np.testing.assert_array_equal(ours(path), peer(path))
    best = {ours: np.inf, peer: np.inf}
    for _ in range(rounds):
        for read in best:
            began = clock()
            for path in paths:
                read(path)
            best[read] = min(best[read], (clock() - began) / len(paths))
    a, b = best[ours] * 1e3, best[peer] * 1e3
    print(f"{name:44s} {a:9.2f} ms {b:9.2f} ms {b / a:6.1f}x   (goal {goal}x)", flush=True)


def compare_halved(name, paths, side):
    """Print how much faster JPEG 2000 is decoded at half of its size, and the difference of the images of `side` px."""
    datasets = [pydicom.dcmread(path) for path in paths]
    best, ways = [np.inf, np.inf], (partial(decode_halved, halvings=1), lambda dataset: decode_by("pylibjpeg", dataset))
    for _ in range(3):
        for number, way in enumerate(ways):
            began = time.process_time()
            for given in (datasets, paths)[number]:
                way(given)
            best[number] = min(best[number], (time.process_time() - began) / len(paths))
    pairs = [[to_square(read_image_and_header(path, s)[0], side).astype(int) for s in (side, 0)] for path in paths]
    differ = np.mean([np.abs(one - other).mean() for one, other in pairs])
    print(f"{name:44s} {best[0] * 1e3:9.2f} ms {best[1] * 1e3:9.2f} ms {best[1] / best[0]:6.1f}x", end="   ")
    print(f"(at {side} px the images differ by {differ:.2f} of 255 on average)", flush=True)


def images_per_second(paths, folder, workers, size=512):
    """Return images/s from the first finished image to the last, so that starting processes does not count."""
    target = Target(str(folder / "images"), size)
    Path(target.path).write_bytes(bytes(HEADER + len(paths) * size * size))
    times = [time.perf_counter() for _ in decode_all(target, list(enumerate(map(str, paths))), workers)]
    pixels = np.fromfile(target.path, np.uint8, offset=HEADER).reshape(-1, size, size)
    np.testing.assert_array_equal(pixels[-1], to_square(read_image(paths[-1]), size))
    return (len(times) - 1) / (times[-1] - times[0])


def main():
    warnings.simplefilter("ignore")
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        root = real_data("siim_pneumothorax")
        siim = sorted(root.glob("dicom-*/*/*/*.dcm")) if root else []
        if not siim:
            for seed in range(20):
                pixels = (anatomy((1024, 1024), 255, seed)).astype(np.uint8)
                stream = cv2.imencode(".jpg", pixels)[1].tobytes()
                siim.append(write_dicom(folder / f"{seed}.dcm", pixels, 8, stream))
        window = {"WindowCenter": 2000, "WindowWidth": 3000, "RescaleSlope": 1, "RescaleIntercept": 0}
        raw16 = write_dicom(folder / "raw16.dcm", anatomy((3000, 2500), 65535), 16)
        raw12 = write_dicom(folder / "raw12.dcm", anatomy((3000, 2500), 4095), 12)
        film = write_dicom(
            folder / "film.dcm", anatomy((3000, 2500), 4095), 12, PhotometricInterpretation="MONOCHROME1", **window
        )
        print(f"{'read one file':44s} {'ours':>12s} {'pydicom':>12s}")
        name = f"{'real' if root else 'generated'} SIIM JPEG, pixel_array"
        compare(name, 4, read_image, pydicom_pixels, siim[:20], 5)
        ours, peer = touched(lambda path: _read_dicom(path)[0]), touched(pydicom_pixels)
        compare("raw 3000x2500, 16 bits stored, all pixels", 1, ours, peer, [raw16], 9)
        compare("raw 3000x2500, 12 bits stored, all pixels", 1, ours, peer, [raw12], 9)
        for syntax, name in ((JPEG2000Lossless, "JPEG 2000"), (JPEG2000, "lossy JPEG 2000")):
            packed = [
                write_jpeg2000(folder / f"{seed}.j2k.dcm", to_square(read_image(file), 2048), 8, syntax)
                for seed, file in enumerate(siim[:4])
            ]
            packed.append(write_jpeg2000(folder / "deep.j2k.dcm", anatomy((3000, 2500), 4095), 12, syntax))
            plugins = (partial(decode_by, plugin) for plugin in ("pylibjpeg", "gdcm"))
            compare(f"{name}, openjpeg against gdcm, CPU", 1.1, *plugins, packed, 3, time.process_time)
            compare_halved(f"{name}, half of the size against whole, CPU", packed, 1024)
        chain = lambda path: to_square(read_image(path), 512)  # noqa: E731
        compare("raw, window, 8 bits, resized to 512", 2, chain, usual_chain, [film, raw16], 4)
        many = (siim * 50)[:1000]
        rates = {1: [], 2: []}
        for _ in range(2):
            for workers, seen in rates.items():
                seen.append(images_per_second(many, folder, workers))
        one, two = max(rates[1]), max(rates[2])
        print(f"prepare: {one:.0f} images/s on one process, {two:.0f} on two: {two / one:.2f}x   (goal 1.8x,", end=" ")
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f})")


if __name__ == "__main__":
    main()
