"""Show predictions in a Kaggle notebook."""

from common.kaggle.session import display_gallery, read_images
from common.post.rle import decode
from common.submit.table import read_table
from solutions.siim_pneumothorax.config import KAGGLE, SIZE


def show_predictions(submission, folder=None, count=4):
    """Show the test images with the largest masks, outlined; folder: of other images."""
    masks = largest_masks(submission, count)
    images = read_images(KAGGLE, masks, SIZE, folder=folder)
    display_gallery([(images[i], None, mask, f"{i}: {mask.mean():.2%} of the image") for i, mask in masks.items()])


def largest_masks(submission, count):
    """Return the `count` largest masks of a submission by image id, largest first; uint8 (SIZE, SIZE)."""
    rows = read_table(submission).itertuples()
    masks = {row.ImageId: decode(row.EncodedPixels, (SIZE, SIZE)) for row in rows}
    largest = sorted(masks, key=lambda image_id: -int(masks[image_id].sum()))[:count]
    return {image_id: masks[image_id] for image_id in largest}
