"""On Kaggle: a few answers as pictures."""

from common.kaggle.mounted import display, images_of
from common.post.rle import decode
from common.submit.table import read_table
from solutions.siim_pneumothorax.config import KAGGLE, SIZE


def show(submission, count=4):
    """Show the test images with the most pneumothorax, and where it is."""
    table = read_table(submission)
    masks = {row.ImageId: decode(row.EncodedPixels, (SIZE, SIZE)) for row in table.itertuples()}
    largest = sorted(masks, key=lambda image_id: -masks[image_id].sum())[:count]
    images = images_of(KAGGLE, largest, SIZE)
    display([(images[i], None, masks[i], f"{i}: {masks[i].mean():.2%} of the image") for i in largest])
