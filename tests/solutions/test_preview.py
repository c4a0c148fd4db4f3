"""The pictures of the notebooks, by value: which images are shown, and with which masks."""

import cv2
import numpy as np
import pandas as pd
import pytest

from common.kaggle import session
from common.post.rle import ABSOLUTE, encode
from solutions.covid19 import report as covid19
from solutions.lung_segmentation import report as lungs
from solutions.rsna_pneumonia import report as rsna
from solutions.siim_pneumothorax import report as siim


@pytest.fixture
def shown(monkeypatch):
    """The items of the gallery that a notebook shows."""
    items = []
    for module in (covid19, lungs, siim):
        monkeypatch.setattr(module, "display_gallery", items.extend)
    return items


def write_images(folder, *names):
    folder.mkdir()
    for number, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((20, 30), 10 + 20 * number, np.uint8))
    return folder


def test_siim_shows_the_largest_masks_with_their_share_of_the_image(shown, tmp_path):
    folder = write_images(tmp_path / "images", "empty.png", "small.png", "large.png")
    (tmp_path / "sub.csv").write_text(f"ImageId,EncodedPixels\nempty,-1\nsmall,0 1024\nlarge,0 {2**19}\n")
    siim.show_predictions(tmp_path / "sub.csv", folder, count=2)
    assert [caption for *_, caption in shown] == ["large: 50.00% of the image", "small: 0.10% of the image"]
    assert [int(mask.sum()) for _, _, mask, _ in shown] == [2**19, 1024]
    assert [int(image[0, 0]) for image, *_ in shown] == [50, 30]


def test_rsna_shows_the_boxes_of_the_highest_scores(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(session, "display_gallery", lambda items, overlay: shown.extend(items))
    folder, table = write_images(tmp_path / "images", "a.png", "b.png", "c.png"), tmp_path / "sub.csv"
    table.write_text("patientId,PredictionString\na,0.2 10 10 30 30\nb,0.3 2 2 6 6 0.9 100 50 5 8\nc,\n")
    rsna.show_predictions(table, folder, count=1)
    ((image, _, boxes, caption),) = shown
    assert image[0, 0] == 30 and caption.split() == ["b:", "0.90"]
    assert [text.strip() for _, text in boxes] == ["0.90", "0.30"]
    assert [box.tolist() for box, _ in boxes] == [[100, 50, 105, 58], [2, 2, 8, 8]]
    table.write_text("patientId,PredictionString\na,\n")
    rsna.show_predictions(table, folder)
    assert len(shown) == 1


def test_images_of_the_same_name_are_shown(shown, tmp_path):
    for name in ("p1", "p2"):
        (tmp_path / "images").mkdir(exist_ok=True)
        write_images(tmp_path / "images" / name, "view.png")
    (tmp_path / "sub.csv").write_text("ImageId,EncodedPixels\np1/view,0 1024\np2/view,-1\n")
    siim.show_predictions(tmp_path / "sub.csv", tmp_path / "images", count=1)
    assert [caption for *_, caption in shown] == ["p1/view: 0.10% of the image"]


def test_lungs_are_shown_with_their_own_masks(shown, tmp_path):
    folder, masks = write_images(tmp_path / "images", "a.png", "b.png"), np.zeros((2, 20, 30), np.uint8)
    masks[0, 5:15, :15], masks[1, :, 20:] = 1, 1
    rows = [(name, 30, 20, encode(mask, ABSOLUTE)) for name, mask in zip("ab", masks, strict=True)]
    pd.DataFrame(rows, columns=["image_id", "width", "height", "rle"]).to_csv(tmp_path / "sub.csv", index=False)
    lungs.show_predictions(tmp_path / "sub.csv", folder)
    np.testing.assert_array_equal([mask for _, _, mask, _ in shown], masks)
    assert [int(image[0, 0]) for image, *_ in shown] == [10, 30] and shown[0][3] == "a: 25% lung"


def test_covid19_shows_the_highest_and_the_lowest_probabilities(shown, tmp_path):
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    table = pd.DataFrame({"filename": names, "probability": [0.5, 0.9, 0.1, 0.7, 0.3]})
    table.to_csv(tmp_path / "sub.csv", index=False)
    covid19.show_predictions(tmp_path / "sub.csv", write_images(tmp_path / "images", *names))
    assert [caption for *_, caption in shown] == ["b.png: 0.90", "d.png: 0.70", "e.png: 0.30", "c.png: 0.10"]
    assert [int(image[0, 0]) for image, *_ in shown] == [30, 70, 90, 50]
