"""The pictures of the notebook on Kaggle."""

from solutions.siim_pneumothorax.preview import largest_masks


def test_the_largest_masks_come_first(tmp_path):
    """Sums are unsigned: their negation would put an empty mask before all others."""
    rows = ("empty,-1", "small,0 3", "large,1024 900 124 900", "middle,5 1000")
    (tmp_path / "submission.csv").write_text("ImageId,EncodedPixels\n" + "\n".join(rows) + "\n")
    masks = largest_masks(tmp_path / "submission.csv", 3)
    assert [(name, int(mask.sum())) for name, mask in masks.items()] == [
        ("large", 1800),
        ("middle", 1000),
        ("small", 3),
    ]
    assert masks["small"][:4, 0].tolist() == [1, 1, 1, 0]
