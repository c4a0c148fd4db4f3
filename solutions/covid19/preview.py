"""Show predictions in a Kaggle notebook."""

import pandas as pd

from common.data.dicom import read_image
from common.kaggle.session import display_gallery
from common.paths import walk_files
from common.submit.table import read_table


def show_predictions(submission, folder, count=4):
    """Show the images of `folder` with the highest and the lowest probabilities."""
    table = read_table(submission).astype({"probability": float})
    table = table.sort_values("probability", ascending=False, kind="stable")
    files = {path.name: path for path in walk_files(folder)}
    rows = pd.concat([table.head(count - count // 2), table.tail(count // 2)]).drop_duplicates()
    shown = [(read_image(files[row.filename]), f"{row.filename}: {row.probability:.2f}") for row in rows.itertuples()]
    display_gallery([(image, None, None, caption) for image, caption in shown])
