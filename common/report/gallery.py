"""Radiographs with outlines of what is there and what was found, as small pictures for the report."""

import cv2
import numpy as np

from common.errors import InputError
from common.report.page import Html, figure, grid, join, note

# Green and orange of the Okabe–Ito palette (Color Universal Design, 2008), brightened for grey pictures.
TRUTH = (0, 200, 145)
PREDICTION = (255, 140, 0)
HEAT = 0.6  # share of the colours where a heat map is highest


def outline_overlay(image, truth=None, prediction=None, size=384):
    """The radiograph with anti-aliased outlines, truth in green and thick, prediction in orange and thin above it.

    `image`: uint8 (H, W); the masks: (H, W), bool or integer, non-zero inside, or None. Returns uint8 RGB with the
    longer side `size` pixels. Outlines follow the outermost pixels of each region and its holes at the masks' own
    resolution, so a region of a single pixel still shows. Raises InputError for other shapes and dtypes.
    """
    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8 or 0 in image.shape:
        raise InputError(f"overlay: the image must be uint8 (H, W), not {image.dtype} {image.shape}")
    scale = size / max(image.shape)
    width, height = (max(1, round(side * scale)) for side in image.shape[::-1])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    rgb = cv2.cvtColor(small, cv2.COLOR_GRAY2RGB)
    thin = max(2, round(size / 192))  # OpenCV drops a dot of thickness 1
    for mask, colour, thickness in ((truth, TRUTH, thin + 2), (prediction, PREDICTION, thin)):
        if mask is not None:
            _outline(rgb, mask, image.shape, colour, thickness)
    return rgb


def _outline(rgb, mask, shape, colour, thickness):
    mask = np.asarray(mask)
    if mask.shape != shape or mask.dtype.kind not in "bui":
        raise InputError(f"overlay: a mask must be bool or integer {shape}, not {mask.dtype} {mask.shape}")
    contours, _ = cv2.findContours((mask != 0).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scale = np.array([rgb.shape[1] / shape[1], rgb.shape[0] / shape[0]])
    shift = 4  # corners in sixteenths of a pixel
    corners = [np.round(((c + 0.5) * scale - 0.5) * 2**shift).astype(np.int32) for c in contours]
    cv2.polylines(rgb, corners, True, colour, thickness, cv2.LINE_AA, shift)


def box_overlay(image, truth=(), prediction=(), size=384):
    """The radiograph with boxes, true ones green and thick, found ones orange and thin above them, with their names.

    `image`: uint8 (H, W); truth and prediction: (box, text) pairs, the box x_min, y_min, x_max, y_max in its pixels.
    Returns uint8 RGB with the longer side `size` pixels. Raises InputError for another image.
    """
    return _boxes(outline_overlay(image, size=size), image.shape, truth, prediction, size)


def heat_overlay(image_and_heat, truth=(), prediction=(), size=384):
    """The radiograph under the colours of a heat map, with boxes as in `box_overlay`.

    `image_and_heat`: the image, uint8 (H, W), and the map, real (h, w) in [0, 1], which is stretched over it: nothing
    where it is 0, then violet to yellow. Returns and raises as `box_overlay`, and InputError for another map.
    """
    image, heat = image_and_heat
    rgb, heat = outline_overlay(image, size=size), np.asarray(heat)
    if heat.ndim != 2 or heat.dtype.kind != "f" or not (heat.size and heat.min() >= 0 and heat.max() <= 1):
        raise InputError(f"overlay: a heat map must be real (h, w) in [0, 1], not {heat.dtype} {heat.shape}")
    heat = cv2.resize(heat.astype(np.float32), rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((heat * 255 + 0.5).astype(np.uint8), cv2.COLORMAP_PLASMA)[..., ::-1]
    share = HEAT * heat[..., None]
    rgb = (rgb * (1 - share) + colours * share + 0.5).astype(np.uint8)
    return _boxes(rgb, image.shape, truth, prediction, size)


def _boxes(rgb, shape, truth, prediction, size):
    scale = np.array([rgb.shape[1] / shape[1], rgb.shape[0] / shape[0]] * 2)
    thin, letter = max(1, round(size / 256)), size / 900
    for pairs, colour, thickness, below in ((truth, TRUTH, thin + 1, False), (prediction, PREDICTION, thin, True)):
        for box, text in pairs:
            x_min, y_min, x_max, y_max = np.round(np.asarray(box, float) * scale).astype(int).tolist()
            cv2.rectangle(rgb, (x_min, y_min), (x_max, y_max), colour, thickness, cv2.LINE_AA)
            (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, letter, 1)
            x = int(np.clip(x_min + 1, 0, max(0, rgb.shape[1] - width)))
            y = int(np.clip(y_max + height + 4 if below else y_min - 4, height + 1, rgb.shape[0] - 3))
            for shade, wide in (((0, 0, 0), 3), (colour, 1)):
                cv2.putText(rgb, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, letter, shade, wide, cv2.LINE_AA)
    return rgb


def jpeg(rgb, quality=80):
    """JPEG bytes of a uint8 RGB (H, W, 3) picture, colour at full resolution so that thin lines stay sharp."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), options)
    if not ok:
        raise InputError(f"a picture of shape {rgb.shape} cannot be written as JPEG")
    return data.tobytes()


def gallery(items, title="", size=384, overlay=outline_overlay):
    """A grid of outlined radiographs under a line of text and the legend of the colours that are drawn.

    `items`: (image, truth, prediction, caption) as in `overlay`, which is `outline_overlay`, `box_overlay` or
    `heat_overlay`; None where there is no truth or prediction to know of; about 25 kB a picture at the default size.
    """
    items = list(items)
    if not items:
        return note(f"{title or 'Pictures'}: nothing to show yet.")
    legend = "".join(
        f'<span><i style="border-color: rgb{colour}"></i>{name}</span>'
        for name, colour, place in (("truth", TRUTH, 1), ("prediction", PREDICTION, 2))
        if any(_is_drawn(item[place]) for item in items)
    )
    pictures = []
    for image, truth, prediction, caption in items:
        known = {"truth": truth, "prediction": prediction}
        marks = {name: marks for name, marks in known.items() if marks is not None}
        pictures.append(figure(jpeg(overlay(image, size=size, **marks)), caption))
    legend = [Html(f'<p class="legend">{legend}</p>')] if legend else []
    return join(*([title] if title else []), *legend, grid(*pictures, small=True))


def _is_drawn(marks):
    return bool(marks.any()) if isinstance(marks, np.ndarray) else marks is not None and len(marks) > 0
