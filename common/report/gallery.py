"""Radiographs with outlines of the truth and the prediction, as small pictures for the report."""

import cv2
import numpy as np

from common.paths import atomic_path
from common.post.boxes import BOX
from common.report.page import Html, figure, grid, join, note

# Green and orange of the Okabe–Ito palette (Color Universal Design, 2008), brightened for grey pictures.
TRUTH = (0, 200, 145)
PREDICTION = (255, 140, 0)
MOST_BOXES = 5  # per picture
HEAT = 0.6  # opacity of the colours where a heat map is highest


def outline_overlay(image, truth=None, prediction=None, size=384):
    """Return the radiograph with anti-aliased outlines, truth in green and thick, prediction in orange and thin on top.

    `image`: uint8 (H, W); the masks: (H, W), bool or integer, non-zero inside, or None. Returns uint8 RGB with the
    longer side `size` pixels. Outlines follow the outermost pixels of each region and its holes at the masks' own
    resolution, so that even a single pixel is visible.
    """
    image = np.asarray(image)
    scale = size / max(image.shape)
    width, height = (max(1, round(side * scale)) for side in image.shape[::-1])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    rgb = cv2.cvtColor(small, cv2.COLOR_GRAY2RGB)
    thin = max(2, round(size / 192))  # OpenCV drops a dot of thickness 1
    for mask, colour, thickness in ((truth, TRUTH, thin + 2), (prediction, PREDICTION, thin)):
        if mask is not None:
            _draw_outline(rgb, np.asarray(mask), colour, thickness)
    return rgb


def _draw_outline(rgb, mask, colour, thickness):
    contours, _ = cv2.findContours((mask != 0).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scale = np.array([rgb.shape[1] / mask.shape[1], rgb.shape[0] / mask.shape[0]])
    shift = 4  # corners in sixteenths of a pixel
    corners = [np.round(((c + 0.5) * scale - 0.5) * 2**shift).astype(np.int32) for c in contours]
    cv2.polylines(rgb, corners, True, colour, thickness, cv2.LINE_AA, shift)


def box_overlay(image, truth=None, prediction=None, size=384):
    """Return the radiograph with labelled boxes, true ones green and thick, predicted ones orange and thin on top.

    `image`: uint8 (H, W); truth and prediction: (box, text) pairs, the box x_min, y_min, x_max, y_max in its pixels, or
    None. Returns uint8 RGB with the longer side `size` pixels.
    """
    return _draw_boxes(outline_overlay(image, size=size), image.shape, truth, prediction, size)


def heat_overlay(image_and_heat, truth=None, prediction=None, size=384):
    """Return the radiograph overlaid with the colours of a heat map, with boxes as in `box_overlay`.

    `image_and_heat`: uint8 (H, W), and a map, real (h, w) in [0, 1], stretched over it: 0 clear, then violet to yellow.
    """
    image, heat = image_and_heat
    rgb = outline_overlay(image, size=size)
    heat = cv2.resize(np.asarray(heat, np.float32), rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((heat * 255 + 0.5).astype(np.uint8), cv2.COLORMAP_PLASMA)[..., ::-1]
    share = HEAT * heat[..., None]
    rgb = (rgb * (1 - share) + colours * share + 0.5).astype(np.uint8)
    return _draw_boxes(rgb, image.shape, truth, prediction, size)


def _draw_boxes(rgb, shape, truth, prediction, size):
    scale = np.array([rgb.shape[1] / shape[1], rgb.shape[0] / shape[0]] * 2)
    thin, labels = max(1, round(size / 256)), []
    for pairs, colour, thickness, below in ((truth, TRUTH, thin + 1, False), (prediction, PREDICTION, thin, True)):
        for box, text in pairs or ():
            x_min, y_min, x_max, y_max = np.round(np.asarray(box, float) * scale).astype(int).tolist()
            cv2.rectangle(rgb, (x_min, y_min), (x_max, y_max), colour, thickness, cv2.LINE_AA)
            labels += [(text, x_min, y_max if below else y_min, below, colour)] if text else []
    for label in labels:  # drawn last, so that no box crosses a label
        _draw_label(rgb, *label, letter=size / 900)
    return rgb


def _draw_label(rgb, text, x, y, below, colour, letter):
    """Write a text on a black box to keep it readable; outlines fail because OpenCV 5 spaces thicker letters wider."""
    (width, height), rest = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, letter, 1)
    x = int(np.clip(x + 1, 1, max(1, rgb.shape[1] - width - 1)))
    y = int(np.clip(y + (height + 4 if below else -4), height + 1, rgb.shape[0] - 3))
    cv2.rectangle(rgb, (x - 1, y - height - 1), (x + width, y + min(rest, 3)), (0, 0, 0), cv2.FILLED)
    cv2.putText(rgb, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, letter, colour, 1, cv2.LINE_AA)


def to_jpeg(rgb, quality=80):
    """Return a picture, uint8 RGB (H, W, 3), as JPEG bytes; chroma is not subsampled, so thin lines stay sharp."""
    options = cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    return cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), options)[1].tobytes()


def gallery(items, title="", size=384, overlay=outline_overlay, names=("truth", "prediction")):
    """Return a grid of small radiographs under a title and a legend of their colours.

    `items`: (image, truth, prediction, caption), the first three as in `overlay`: `outline_overlay`, `box_overlay` or
    `heat_overlay`. Truth and prediction may be None; `names`: theirs in the legend. A picture takes about 25 kB.
    """
    items = list(items)
    if not items:
        return note(f"{title or 'Pictures'}: nothing to show yet.")
    legend = "".join(
        f'<span><i style="border-color: rgb{colour}"></i>{name}</span>'
        for name, colour, place in ((names[0], TRUTH, 1), (names[1], PREDICTION, 2))
        if any(np.any(item[place]) if isinstance(item[place], np.ndarray) else item[place] for item in items)
    )
    pictures = [figure(to_jpeg(overlay(image, *marks, size)), caption) for image, *marks, caption in items]
    legend = [Html(f'<p class="legend">{legend}</p>')] if legend else []
    return join(*([title] if title else []), *legend, grid(*pictures, small=True))


def label_boxes(found, names, scale=1.0):
    """Return the MOST_BOXES best boxes of one image's detections, times `scale`, and their texts, as pairs."""
    best = found.nlargest(MOST_BOXES, "score")
    texts = [f"{names[k]} {score:.2f}" for k, score in zip(best["class_id"], best["score"], strict=True)]
    return list(zip(best[BOX].to_numpy() * scale, texts, strict=True))


def box_gallery(images, found, rows, title, names):
    """Return pictures of images with their true boxes, if labelled, and at most MOST_BOXES of the boxes in `found`.

    images: an Images with the table boxes.parquet; rows: of its table, `note` goes into the caption; names: classes.
    """
    true, items = images.tables.get("boxes.parquet"), []
    for _, row in rows.iterrows():
        scale = 512 / max(row["width"], row["height"])  # in the original's proportions
        size = [max(1, round(row[side] * scale)) for side in ("width", "height")]
        image = cv2.resize(np.asarray(images.store.images[row["row"]]), size, interpolation=cv2.INTER_AREA)
        truth, predicted = None, label_boxes(found[found["image_id"] == row["image_id"]], names, scale)
        if row["split"] == "train":
            own = true[true["row"] == row["row"]]
            truth = [(box * scale, names[k]) for box, k in zip(own[BOX].to_numpy(), own["class_id"], strict=True)]
        items.append((image, truth, predicted, row["image_id"] + row.get("note", "")))
    return gallery(items, title, overlay=box_overlay)


def best_boxes(job, found, names):
    """Return a text with the number of boxes in a detection table, and pictures of its highest scoring test images."""
    best = found.groupby("image_id")["score"].max().nlargest(8).index
    rows = job.images.table.set_index("image_id", drop=False).loc[best]
    text = f"{len(found):,} boxes on {found['image_id'].nunique():,} images."
    return [text, box_gallery(job.images, found, rows, "Test images with the highest scores", names)]


def augmented_gallery(data, captions, count=4, size=200):
    """Return pictures of the first images of a Dataset, one per caption, plain and with `count` augmentations each."""
    items = []
    for index, caption in enumerate(captions):
        draws = {index: caption} | {(index, index * count + k): f"augmented, draw {k + 1}" for k in range(count)}
        items += [(data[key][0][0].numpy(), None, None, text) for key, text in draws.items()]
    return gallery(items, size=size)


def pick_extremes(ordered, count=4):
    """Return the "Best", "Median" and "Worst" `count` rows of a table sorted from worst to best."""
    middle = max(0, len(ordered) // 2 - count // 2)
    return {"Best": ordered[::-1][:count], "Median": ordered[middle : middle + count], "Worst": ordered[:count]}


def cached_arrays(path, key, compute):
    """Return the arrays of `compute()` by name, cached in the .npz file `path` under `key`."""
    try:
        with np.load(path) as file:
            if str(file["key"]) == key:
                return {name: file[name] for name in file.files if name != "key"}
    except Exception:  # absent or damaged: numpy and zlib raise many kinds of errors
        pass
    arrays = compute()
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, key=key, **arrays)
    return arrays
