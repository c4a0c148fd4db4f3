"""`export` and `infer`: test images predicted by what a finished run has learnt, without the run."""

from common.config import from_dict
from common.errors import InputError
from common.infer.tools import export_tool, infer_tool
from common.paths import read_json
from common.trained import Learnt
from common.tuning import Rule
from solutions.siim_pneumothorax.config import KAGGLE, Config

NAME = "siim_pneumothorax"


def learnt(context):
    """The Learnt of a finished run; InputError where a step is missing, or follows from other networks."""
    from solutions.siim_pneumothorax.pipeline import NEUTRAL, read_rule, weight_files  # late: it takes seconds

    run = context.run
    _, saved = read_rule(context)
    if not run.is_done("score", run.step("tune")["key"], ["score.json"]):
        raise InputError(f"{run.folder}: no score of this rule; run the verb `score` (or `run` for all)")
    weights = [path for fold in context.config.folds for path in weight_files(context, fold)]
    score = read_json(run.path("score.json"))[KAGGLE.score]
    return Learnt(weights, saved, KAGGLE.score, score, NEUTRAL, {})


def prepare(context, trained):
    """The test images, decoded."""
    from solutions.siim_pneumothorax.data import prepare_test

    return prepare_test(context)


def answer(context, data, trained, out):
    """Predict the test images and write the submission `out`; returns its Summary."""
    from solutions.siim_pneumothorax.pipeline import predict_test, write_answer

    rule = from_dict(Rule, trained.rule.get("rule"), f"{trained.about}: rule")
    predict_test(context, data)
    return write_answer(context, data, rule, out)[1]


TOOLS = {"export": export_tool(NAME, Config, learnt), "infer": infer_tool(NAME, Config, prepare, answer)}
