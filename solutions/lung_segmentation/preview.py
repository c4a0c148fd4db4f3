"""Show predictions in a Kaggle notebook."""

from common.data.dicom import read_image
from common.kaggle.session import display_gallery
from common.paths import KAGGLE_INPUT, find_images
from common.post.rle import ABSOLUTE, decode
from common.submit.table import read_table
from solutions.lung_segmentation.pairs import READ, bare_stem, find_pairs


def show_predictions(submission, folder=None, count=4):
    """Show the first images, in `folder` or of the mounted collections, with their lungs outlined."""
    if folder is None:
        files = {pair.image_id: pair.image for pair in find_pairs(KAGGLE_INPUT)}
    else:
        files = {bare_stem(stem): path for stem, path in find_images(folder, READ).items()}
    items = []
    for row in read_table(submission)[:count].itertuples():
        mask = decode(row.rle, (int(row.height), int(row.width)), ABSOLUTE)
        items.append((read_image(files[row.image_id]), None, mask, f"{row.image_id}: {mask.mean():.0%} lung"))
    display_gallery(items)
