"""The user's own images: one of four recipes, chosen by the task that the labels fit."""

from dataclasses import replace

from common.errors import check
from common.recipe import Solution
from solutions.own import boxes, classify, data, masks, report
from solutions.own.comparison import COMPARISON
from solutions.own.labels import find_labels, read_labels, task_of


def make_solution(recipe, metric, headline, *chosen):
    """Return the Solution of a recipe module; headline: its Comparison's metric; chosen: files that `choose` writes."""
    return Solution(
        "own",
        metric,
        made_with=lambda config: {name: getattr(config, name) for name in data.MADE_WITH},
        read=data.read,
        refine=recipe.refine,
        read_test=data.read_test,
        refine_test=data.add_view,
        networks=lambda job: [recipe.network(job, fold) for fold in job.config.folds],
        predict=recipe.predict_rows,
        choose=recipe.choose,
        chosen=chosen,
        describe=recipe.describe,
        answer=recipe.answer,
        comparison=replace(COMPARISON, headline=headline),
        report=report,
        **recipe.FURTHER,
    )


RECIPES = {
    "multilabel": make_solution(classify, "auroc", "mean", "classes.csv"),
    "multiclass": make_solution(classify, "auroc", "mean", "classes.csv", "confusion.csv"),
    "segmentation": make_solution(masks, "dice", "dice", "structures.csv", "oof_dice.parquet"),
    "detection": make_solution(boxes, "map", "mAP", "classes.csv"),
}


def pick(job, verb):
    """Return the Solution of the job's task, which `plan` and `prepare` infer from the labels and later verbs read.

    A column `fold` or `split` of the labels also determines the number of folds, and which of them to hold out unless
    `--folds` names some of them.
    """
    config, found = job.config, {}
    if verb in ("prepare", "plan"):
        path = find_labels(job.options.data, config.labels)
        task = config.task if config.task != "auto" else task_of(path)
        found = {"task": task} | data.folds_of(read_labels(path, task, config.classes, job.options.data).images)
    elif config.task == "auto":
        about = (job.run.step("prepare") or {}).get("about", {})
        found = {name: about[name] for name in ("task", "n_folds", "folds") if name in about}
    if "folds" in found and config.folds != tuple(range(config.n_folds)):  # named by --folds
        known = found["folds"]
        check(set(config.folds) <= set(known), f"--folds {config.folds}: the labels have the folds {tuple(known)}")
        found["folds"] = config.folds
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    job.config = replace(config, **found)
    return RECIPES.get(job.config.task, RECIPES["multilabel"])


SOLUTION = replace(RECIPES["multilabel"], pick=pick)
