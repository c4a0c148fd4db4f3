"""A challenge of twelve grey images, bright or dark, for tests of the engine: read in a moment, trained in another."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import torch

from common.budget import Budget
from common.compare import Comparison, means_of
from common.config import FitConfig
from common.data.tables import read_ids
from common.job import Job
from common.kaggle import Source
from common.listing import Listing, check_files, find_files, list_test
from common.network import Network, predict
from common.options import Options
from common.recipe import Choice, Solution
from common.runs import Run
from common.submit.validate import validate_probabilities

COLUMNS = ["id", "bright"]
SOURCE = Source("competition", ("toys",), samples=("sample_submission.csv",))


@dataclass(frozen=True)
class Config:
    net: FitConfig = field(default_factory=lambda: FitConfig(epochs=2, batch_size=4, precision="fp32"))
    n_folds: int = 2
    folds: tuple[int, ...] = (0, 1)
    store_size: int = 8
    seed: int = 0
    tta: tuple[str, ...] = ()
    cuts: tuple[float, ...] = (0.4, 0.5)


def write_data(folder, n_train=8, n_test=4):
    """Write the images, labels.csv with a patient for every two images, and sample_submission.csv; return `folder`."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(n_train + n_test):
        bright = number // 2 % 2
        cv2.imwrite(str(folder / f"i{number:02d}.png"), rng.integers(0, 100, (8, 8), np.uint8) + np.uint8(120 * bright))
        rows.append((f"i{number:02d}", bright, f"p{number // 2}"))
    pd.DataFrame(rows[:n_train], columns=["id", "bright", "patient"]).to_csv(folder / "labels.csv", index=False)
    pd.DataFrame(rows[n_train:], columns=["id", "bright", "p"])[COLUMNS].to_csv(
        folder / "sample_submission.csv", index=False
    )
    return folder


def read(job):
    folder = job.options.data
    labels = pd.read_csv(folder / "labels.csv", dtype={"patient": str})
    files, test = find_files(folder, job.options, lambda: read_ids(folder / "sample_submission.csv", COLUMNS))
    check_files(labels["id"].tolist(), test, files, folder / "labels.csv", job.options)
    bright = labels["bright"].to_numpy()
    return Listing(
        folder, table(labels["id"], test, bright, labels["patient"]), files, sample(test), bright, bright.tolist()
    )


def table(train, test, bright=(), patients=()):
    ids, n = [*train, *test], len(test)
    split = ["train"] * len(train) + ["test"] * n
    return pd.DataFrame(
        {"image_id": ids, "patient_id": [*patients, *[""] * n], "split": split, "bright": [*bright, *[0] * n]}
    )


def sample(ids):
    return pd.DataFrame({"id": ids, "bright": 0.5})


def read_test(job):
    folder, ids, files = list_test(job.options, SOURCE, COLUMNS)
    return Listing(folder, table([], ids), files, sample(ids))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 1)

    def forward(self, images):
        return self.linear(images.flatten(1) / 255)


def networks(job):
    return [network(job.config.net, fold) for fold in job.config.folds]


def network(config, fold, **changes):
    def dataset(job, rows, augment, targets):
        labels = job.images.at(np.arange(len(job.images.table)))["bright"].to_numpy(np.float32)
        return job.images.dataset(rows, 8, targets=(lambda row: labels[[row]]) if targets else None)

    def figures(job, probs, rows):
        right = float(((probs > 0.5) == job.images.at(rows)["bright"].to_numpy()).mean())
        return {"score": right, "accuracy": right}

    parts = {"dataset": dataset, "figures": figures, "measure": lambda output, target: torch.sigmoid(output)[:, 0]}
    parts["loss"] = torch.nn.functional.binary_cross_entropy_with_logits
    return Network(fold, "net", config, lambda weights: Net(), **(parts | changes))


def predict_rows(job, folds, rows, path, title):
    nets = [network(job.config.net, fold) for fold in folds]
    probs = predict(job, nets, rows, title=title)[:, 0] if len(rows) else np.empty(0)
    return {"": job.images.named(rows).assign(bright=probs)}


def choose(job, oof):
    truth, probs = job.images.at(oof.table["row"])["bright"].to_numpy(), oof.table["bright"].to_numpy()
    scores = {cut: float(((probs > cut) == truth).mean()) for cut in job.config.cuts}
    cut = max(scores, key=scores.get)
    figures = {"accuracy": {"estimate": scores[cut], "low": 0.0, "high": 1.0}}
    return Choice({"cut": cut}, scores[cut], figures, {"cuts.csv": pd.DataFrame(scores.items())})


def answer(job, test, rule, neutral):
    rows = test.table[["image_id", "bright"]].set_axis(COLUMNS, axis=1)
    rows.loc[~job.images.at(test.table["row"])["ok"].to_numpy(), "bright"] = neutral
    return rows


def rated(table):
    """Return a table of truth and probability with accuracy and precision, NaN where an image does not count."""
    called = table["probability"] > 0.5
    return table.assign(accuracy=(called == table["truth"]).astype(float), precision=table["truth"].where(called))


def results(job, split):
    oof = pd.read_parquet(job.run.path("oof.parquet"))
    about = job.images.at(job.images.rows_of(oof["image_id"])).reset_index(drop=True)
    return {"": rated(oof.assign(patient_id=about["patient_id"], truth=about["bright"], probability=oof["bright"]))}


def read_scores(path):
    return pd.read_csv(path, index_col=0, dtype={"patient_id": str}).rename(columns={"bright": "probability"})


COMPARISON = Comparison(
    results,
    means_of({"accuracy": "accuracy", "precision": "precision"}),
    read_scores,
    read_scores,
    "accuracy",
    join=lambda predictions, labels: rated(predictions.join(labels)),
    published=pd.DataFrame({"network": ["theirs"], "accuracy": [0.5]}),
    note="A note.",
)
TOY = Solution(
    "toy",
    "accuracy",
    read=read,
    read_test=read_test,
    networks=networks,
    predict=predict_rows,
    choose=choose,
    chosen=("cuts.csv",),
    prediction_key=lambda config: list(config.tta),
    decision_key=lambda config: list(config.cuts),
    describe=lambda figures: [f"accuracy {figures['accuracy']['estimate']:.2f}"],
    neutral=lambda job: 0.5,
    answer=answer,
    check=lambda path, job: validate_probabilities(path, job.sample_path),
    comparison=COMPARISON,
    report=SimpleNamespace(
        TITLE="Toys",
        headline=lambda job, score: [],
        sections=lambda job: [],
        hints=lambda *of: [],
        submission=lambda job, record: [],
    ),
)


def make_job(folder, config=None, recipe=TOY, **options):
    """Return the Job of a new or existing run in `folder`; its run must be closed."""
    options, device = Options(out=folder, workers=0, **options), torch.device("cpu")
    submissions = folder.parent / "submissions"
    return Job(
        "toy", "demo", config or Config(), options, Run(folder), device, Budget(None), submissions, recipe=recipe
    )
