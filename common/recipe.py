"""The verbs of every solution, written once, for any Solution.

A solution's `pipeline.py` ends in `SOLUTION = Solution(…)`: plain functions in the order in which a run calls them.
What all solutions share (folds, store, trainings, predictions, staleness, submission, copies) is here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from common import network as networks_of
from common import processes
from common.config import FitConfig, digest, file_hash, to_dict
from common.errors import InputError, check, log
from common.images import prepare_images
from common.metrics.statistics import format_interval
from common.paths import copy_file, read_json, write_csv, write_json, write_table
from common.plan import announce, plan
from common.predictions import predict_all, prediction_files, prediction_key, read_predictions
from common.report.frame import write_report
from common.step import Step, changed_settings, require, run_step
from common.submit.table import write_submission
from common.submit.validate import validate_probabilities
from common.teaching import find_lessons, name_teachers
from common.train.queue import work_through

RULES = ("decision", "fusion")  # parts of configurations that do not affect predictions


@dataclass(frozen=True)
class Choice:
    """A decision rule chosen on out-of-fold predictions, and its nested score.

    rule: JSON for tuned.json. score: the headline figure. figures: JSON for score.json, including the solution's
    metric as a dict of estimate, low and high. tables: further tables by file name, .csv or .parquet.
    """

    rule: dict
    score: float
    figures: dict
    tables: dict = field(default_factory=dict)


def nothing(*args):
    """Do nothing and return None: the default of a hook."""


def predicting_settings(config):
    """Return the settings that affect predictions: all but those of the decision and of training."""
    training, kept = vars(FitConfig()), {k: v for k, v in to_dict(config).items() if k not in RULES}
    parts = {name: part.items() for name, part in kept.items() if isinstance(part, dict)}
    return kept | {name: {k: v for k, v in part if k not in training} for name, part in parts.items()}


@dataclass(frozen=True)
class Solution:
    """Everything that is specific to one challenge.

    name, metric: the solution's name; the key of the headline score in score.json.
    made_with(config) -> dict of JSON: the settings that `prepare` depends on.
    read(job) -> Listing of the challenge; refine(job, Listing, Store) -> Listing, after the images are decoded.
    read_test(job), refine_test (default: refine): the same for test images only, without a label table.
    networks(job) -> list of all Networks that a run trains, each after those that it needs.
    before_training(job): checks or preparations before the first training.
    predict(job, folds, rows, path, title) -> dict of tables by suffix ("": the main table), averaged over the networks
    of the folds. Maps are written to the file `path`. suffixes(config): the suffixes; maps: whether there are maps.
    pool(suffix, tables) -> table: combines the folds' predictions of the test images; None: predict gets all folds at
    once. prediction_key(config) -> JSON that predictions depend on in addition to weights and pixels.
    choose(job, Predicted of the out-of-fold images) -> Choice; decision_key(config) -> JSON that it depends on. By
    default, the decision depends on the configuration's parts `decision` and `fusion`, and predictions on all others
    except FitConfig's fields.
    chosen: names of the files that `tune` writes in addition to tuned.json and score.json.
    describe(figures) -> lines that report the score.
    neutral(job) -> JSON: the prediction for an unreadable image.
    answer(job, Predicted of the test images, rule, neutral) -> the submission as a table; answered: names of the files
    that `submit` writes in addition to submission.csv. check(path, job) -> Summary.
    boxes(job) -> (detections of the submission, names of the classes) for `export --coco`, or None.
    hidden(job, submission) -> dict of metric, value and nothing (a trivial submission's score) on the sample's hidden
    labels, or None.
    report: the module with the page's own sections, see common.report.frame. further_steps: further verbs as Steps;
    further_verbs: further verbs as functions of a job.
    assets(config) -> further files that an export needs, by name; use_assets(config, files) -> the configuration that
    uses their copies.
    soft_labels(Predicted) -> table of probabilities by image_id, with the labels' names in the image table.
    pick(job, verb) -> the Solution for a job, if the configuration decides which of several applies.
    """

    name: str
    metric: str
    read: Callable
    networks: Callable
    predict: Callable
    choose: Callable
    describe: Callable
    answer: Callable
    report: ModuleType
    comparison: Any
    check: Callable = lambda path, job: validate_probabilities(path, job.sample_path, ordered=True)
    read_test: Callable = nothing
    made_with: Callable = lambda config: {name: getattr(config, name) for name in ("n_folds", "seed", "store_size")}
    refine: Callable = lambda job, listing, store: listing
    refine_test: Callable | None = None
    before_training: Callable = nothing
    suffixes: Callable = lambda config: ("",)
    maps: bool = False
    pool: Callable | None = None
    prediction_key: Callable = predicting_settings
    decision_key: Callable = lambda config: {k: v for k, v in to_dict(config).items() if k in RULES}
    chosen: tuple = ()
    answered: tuple = ()
    neutral: Callable = nothing
    boxes: Callable = nothing
    hidden: str = ""
    further_steps: tuple = ()
    further_verbs: dict = field(default_factory=dict)
    assets: Callable = lambda config: {}
    use_assets: Callable = lambda config, files: config
    soft_labels: Callable = lambda found: found.table
    pick: Callable = nothing

    def steps(self):
        """Return every Step by its name."""
        files = partial(prediction_files, names=("oof", "test"))
        predicted = Step("predict", predict_all, reads=prediction_key, files=files)
        tuned = Step(
            "tune",
            tune,
            needs=("predict",),
            reads=lambda job: [self.decision_key(job.config), job.config.seed, job.images.table["patient_id"].tolist()],
            files=("tuned.json", "score.json", *self.chosen),
        )
        submitted = Step("submit", submit, needs=("tune",), files=("submission.csv", *self.answered))
        make = networks_of.find_learning_rates
        tested = Step("find_lr", make, reads=networks_of.rates_key, files=networks_of.rates_files)
        return {step.name: step for step in (predicted, tuned, submitted, tested, *self.further_steps)}

    def verbs(self):
        """Return the functions of all verbs by name; each takes a Job."""
        parts = {function.__name__: (function,) for function in (prepare, train, score, report, plan)}
        parts |= {name: (partial(_run_named, name),) for name in ("predict", "tune", "submit")}
        for name in ("find_lr", *(one.name for one in self.further_steps)):
            parts[name] = partial(_run_named, name), write_page
        parts |= {name: (function, write_page) for name, function in self.further_verbs.items()}
        return {name: partial(self._run_verb, name, functions) for name, functions in parts.items()}

    def _run_verb(self, name, functions, job):
        job.recipe = self.pick(job, name) or self
        for function in functions:
            function(job)


def _run_named(name, job):
    """Run a step of the job's Solution by its name."""
    run_step(job, job.steps[name])
    job.keep_config()


# ---- preparation and training --------------------------------------------------------------------------------------


def prepare(job):
    """Convert the competition's files to the image table, the folds and the store, in the main process."""

    def make():
        job.refuse_derived()
        name_teachers(job)
        networks_of.check_initial_weights(job)
        prepare_images(job, job.recipe, announce)

    processes.ask_main(make)


def train(job):
    """Train every network of the run, in the recipe's order."""
    job.refuse_derived()
    _ = job.images  # raises before anything is written if the run is not prepared
    if job.run.joined and (changed := changed_settings(job)):
        raise InputError(f"{job.run.folder}: another process trains this run with other settings{changed}")
    name_teachers(job)
    job.recipe.before_training(job)
    job.lessons = find_lessons(job)
    networks_of.check_initial_weights(job)
    train_all(job, job.recipe.networks(job))


def train_all(job, trainings):
    """Train these Networks, each after those that it needs, together with all other processes that work on the run."""
    for network in trainings:  # before the first one is trained
        for rows, what in zip(network.rows(job, network.fold), ("train on", "validate on"), strict=True):
            found = f"fold{network.fold}/{network.stage}: no image to {what}, or none with one of its classes"
            check(len(rows), f"{found}; choose fewer folds (--n-folds)")

    def train_one(network):
        later = [one for one in trainings if one is not network and not one.is_finished(job.run)]
        networks_of.train(job, network, later[:: max(1, processes.count() // processes.world())])
        if all(one.is_finished(job.run) for one in trainings if one.fold == network.fold):
            job.keep_config()

    for network in trainings:
        if processes.is_main() and network.is_finished(job.run):
            with processes.working_as(processes.ALONE):
                networks_of.train(job, network)  # only checks that the finished training matches
    work_through(trainings, job.run, job.budget, train_one, job.options.devices_per_training)
    job.keep_config()


# ---- decision and submission ---------------------------------------------------------------------------------------


def tune(job):
    """Choose the decision rule on out-of-fold predictions and write its nested score."""
    choice = job.recipe.choose(job, read_predictions(job, "oof"))
    for name, table in choice.tables.items():
        (write_csv if name.endswith(".csv") else write_table)(job.run.path(name), table)
    write_json(job.run.path("tuned.json"), choice.rule)
    write_json(job.run.path("score.json"), choice.figures)
    log.info(f"tuned: {job.recipe.metric} {choice.score:.4f} out of fold; the rule is in {job.run.path('tuned.json')}")
    return {"score": choice.score}


def read_rule(job):
    """Return the content of tuned.json, see `_read_tuned`."""
    return _read_tuned(job, "tuned.json")


def read_score(job):
    """Return the content of score.json, see `_read_tuned`. Raises InputError for a refit, which has no score."""
    check(job.run.step("refit") is None, f"{job.run.folder}: trained on all images, so it has no score of its own")
    return _read_tuned(job, "score.json", job.recipe.metric)


def _read_tuned(job, name, *metrics):
    """Return a file of `tune`. Raises InputError if `tune` is not current or the file lacks one of `metrics`."""
    require(job, job.steps["tune"])
    path = job.run.path(name)
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(metric), dict) for metric in metrics):
        raise InputError(f"{path}: not what `tune` writes; delete it and run again")
    return found


def score(job):
    """Print the cross-validated score that `tune` computed."""
    for line in job.recipe.describe(read_score(job)):
        log.info(line)


def submit(job):
    """Write submission.csv, validate it against the sample submission, and copy it to submissions/."""
    run = job.run
    if not len(job.images.rows("test")):
        log.info("submit: no test images; --test names some")
        run.path("submission.csv").unlink(missing_ok=True)
        return {"rows": 0, "hidden": None}
    neutral = neutral_of(job)
    summary = write_answer(job, read_rule(job), neutral, run.path("submission.csv"))
    copy = copy_submission(job, run.path("submission.csv"))
    log.info(f"valid submission: {summary}; copy in {copy}")
    hidden = _score_hidden(job) if run.step("prepare")["synthetic"] else None
    if hidden:
        trivial = f"a trivial submission: {hidden['nothing']:.4f}"
        log.info(f"{hidden['metric']} on the sample's hidden labels {hidden['value']:.4f} ({trivial})")
    return {"rows": summary.rows, "hidden": hidden}


def _score_hidden(job):
    """Return the scores of the submission and of a trivial one on the sample's hidden labels, a dict.

    None without such labels, if images or classes other than the sample's are predicted, and for an undefined score.
    """
    labels = Path(job.run.step("prepare")["data"], job.recipe.hidden)
    if not job.recipe.hidden or not labels.exists():
        return None
    files = {"value": job.run.path("submission.csv"), "nothing": job.sample_path}
    try:
        scores = {name: job.recipe.comparison.score(file, labels) for name, file in files.items()}
    except InputError:
        return None
    return None if np.isnan(scores["value"]) else {"metric": job.recipe.metric, **scores}


def neutral_of(job):
    """Return the prediction for unreadable images as JSON; a refit uses that of its run."""
    refit = job.run.step("refit")
    return refit["neutral"] if refit else job.recipe.neutral(job)


def write_answer(job, rule, neutral, path):
    """Write the submission of the predicted test images to `path`, validate it, and return its Summary."""
    write_submission(path, job.recipe.answer(job, read_predictions(job, "test"), rule, neutral))
    return job.recipe.check(path, job)


def copy_submission(job, path):
    """Copy a submission to submissions/, named by solution, run and content, and return the copy's path."""
    run = job.run.folder.name
    stem = run if run.startswith(job.solution) else f"{job.solution}-{run}"
    copy = job.submissions / f"{stem}-{digest(file_hash(path))[:6]}{path.suffix}"
    copy_file(path, copy)
    return copy


def report(job):
    """Write report.html from the results so far, and log the score and the paths of submission and page."""
    try:
        log.info(f"score: {job.recipe.metric} {format_interval(read_score(job)[job.recipe.metric])} out of fold")
    except InputError as error:
        log.info(f"no score: {error}")
    if job.is_current("submit") and job.run.path("submission.csv").is_file():
        log.info(f"submission: {job.run.path('submission.csv')}")
    write_page(job)


def write_page(job):
    """Write report.html and log its path; a refit has no page."""
    if not processes.is_main():
        return
    if job.run.step("refit") is not None:
        log.info(f"no page: the page of {job.run.step('refit')['run']} shows how the rule was chosen")
        return
    with processes.working_as(processes.ALONE):
        write_report(job, job.recipe.report)
    log.info(f"page: {job.run.path('report.html')}")
