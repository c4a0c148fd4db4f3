"""`export` and `infer`: test images predicted by what a finished run has learnt, without the run."""

from common.config import from_dict
from common.infer.tools import export_tool, infer_tool
from common.paths import read_json
from common.steps import trained_weights
from common.trained import Learnt
from solutions.vinbigdata.config import KAGGLE, Config
from solutions.vinbigdata.postprocess import NOTHING, DecisionRule

NAME = "vinbigdata"


def learnt(context):
    """The Learnt of a finished run; InputError where a step is missing, or follows from other networks."""
    from solutions.vinbigdata.pipeline import read_rule, trained_parts  # late: it takes seconds

    run = context.run
    read_rule(context)  # refuses a rule that is not of these networks
    weights = [trained_weights(run, fold, stage) for fold, stage in trained_parts(context.config)]
    tuned, score = (read_json(run.path(name)) for name in ("tuned.json", "score.json"))
    return Learnt(weights, tuned, KAGGLE.score, score[KAGGLE.score], NOTHING, {})


def prepare(context, trained):
    """The test images, decoded."""
    from solutions.vinbigdata.data import prepare_test

    return prepare_test(context)


def answer(context, data, trained, out):
    """Predict the test images and write the submission `out`; returns its Summary."""
    from solutions.vinbigdata.pipeline import predict_test, write_answer

    rule = from_dict(DecisionRule, trained.rule.get("rule"), f"{trained.about}: rule")
    return write_answer(context, data, rule, *predict_test(context, data), out)[1]


TOOLS = {"export": export_tool(NAME, Config, learnt), "infer": infer_tool(NAME, Config, prepare, answer, True)}
