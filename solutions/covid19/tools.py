"""The tool `table`: runs side by side, the paper's table 7."""

from common.compare import table_tool
from solutions.covid19.config import PRINTED, Config
from solutions.covid19.pipeline import SOLUTION
from solutions.covid19.scoring import METRICS, published, with_truth


def results(job, oof):
    """Return the scored out-of-fold predictions with their labels."""
    table = with_truth(job.images, oof)
    columns = ["image_id", "patient_id", "fold", "label", "probability"]
    return table.loc[table["role"] == "main", columns].assign(truth=table["label"])


TOOLS = {"table": table_tool(SOLUTION, Config, results, METRICS, published(), PRINTED)}
