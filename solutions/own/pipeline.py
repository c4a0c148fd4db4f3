"""Own images: the Solution of the task that the labels are made for, see classify, masks and boxes."""

from dataclasses import replace

from solutions.own import boxes, classify, masks
from solutions.own.data import given_folds
from solutions.own.labels import find_labels, task_of

RECIPES = {task: classify.make_solution(task) for task in ("multilabel", "multiclass")}
RECIPES |= {"segmentation": masks.SEGMENTATION, "detection": boxes.DETECTION}


def pick(job, verb):
    """Return the Solution of the job's task; the labels decide it in `prepare`, and its record for later verbs.

    A column `fold` or `split` of the labels also decides how many folds there are.
    """
    config, found = job.config, {}
    if verb in ("prepare", "plan"):
        path = find_labels(job.options.data, config.labels)
        task = config.task if config.task != "auto" else task_of(path)
        found = {"task": task, **given_folds(path, task, config.classes, job.options.data)}
    elif config.task == "auto":
        about = (job.run.step("prepare") or {}).get("about", {})
        found = {name: about[name] for name in ("task", "n_folds", "folds") if name in about}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    job.config = replace(config, **found)
    return RECIPES.get(job.config.task, RECIPES["multilabel"])


SOLUTION = replace(RECIPES["multilabel"], pick=pick)
