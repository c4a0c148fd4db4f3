"""What `table`, the paper's table 7, and `score_predictions` measure, and the files they read."""

import pandas as pd

from common.compare import Comparison, by_rows
from common.data.tables import read_list
from common.errors import InputError, check
from common.metrics.statistics import resample_aurocs
from common.paths import read_parquet
from common.submit.boxes import NUMBER
from solutions.covid19.collections import read_collections, strip_suffix
from solutions.covid19.config import PRINTED
from solutions.covid19.scoring import METRICS, published, with_truth


def results(job, split):
    """Return the scored out-of-fold predictions with their labels."""
    table = with_truth(job.images, read_parquet(job.run.path("oof.parquet")))
    columns = ["image_id", "patient_id", "fold", "label", "probability"]
    return {"": table.loc[table["role"] == "main", columns].assign(truth=table["label"])}


def read_probabilities(path):
    """Return `probability` by image from a CSV with a header: the image, then its probability of COVID-19."""
    return _read(path, "probability", lambda text: bool(NUMBER.fullmatch(text)) and 0 <= float(text) <= 1)


def read_labels(path):
    """Return `label` 0/1 by image: of the collections in a folder, or of a CSV of image and label."""
    if not path.is_dir():
        return _read(path, "label", lambda text: text in ("0", "1"))
    table = read_collections([path])
    return table[table["label"] >= 0].set_index("image_id")[["label", "patient_id"]]


def _read(path, name, is_valid):
    table = read_list(path)
    check(table.shape[1] >= 2, f"{path}: needs two columns, the image and its {name}")
    ids, texts = table[table.columns[0]].map(strip_suffix), table[name if name in table else table.columns[1]]
    for row in texts.index[~texts.map(is_valid)][:1]:
        raise InputError(f"{path}, row {row + 2} ({ids[row]}): {texts[row]!r} is not a {name}")
    for row in ids.index[ids.duplicated()][:1]:
        raise InputError(f"{path}, row {row + 2}: {ids[row]} appears twice")
    return pd.DataFrame({name: texts.astype(float).to_numpy()}, ids.to_numpy())


def measure(table, groups, n_resamples, seed):
    """Return the paper's figures at 0.5, and the AUROC, by the bootstraps of score.json."""
    figures = by_rows({name: metric for name, metric in METRICS.items() if name != "AUROC"})
    y, probs = (table[[name]].to_numpy() for name in ("label", "probability"))
    areas, resamples = resample_aurocs(y, probs, groups, n_resamples, seed, skip_undefined=True)
    return figures(table, groups, n_resamples, seed) | {"AUROC": (areas[0], resamples[:, 0])}


COMPARISON = Comparison(results, measure, read_probabilities, read_labels, published=published(), note=PRINTED)
