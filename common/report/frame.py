"""The page of a run: the sections that all solutions share, around a solution's own."""

from common.errors import check
from common.paths import read_csv, read_json, read_parquet
from common.report import page, plots
from common.report.hints import find_hints
from common.report.training import read_trainings, training_section


def write_report(job, report):
    """Write report.html from the results that a run has so far.

    job: a common.job.Job. report: a module with TITLE, `headline(job, score)` (fragments above the sections),
    `sections(job)` (a list of sections, None for an empty one), `submission(job, record)` (fragments about
    submission.csv) and optionally `hints(job, score, trainings)` (texts, see common.report.hints) and EXPERIMENTS,
    prefixes of the stage names of experiments.
    """
    run, experiments, scores, hints = job.run, getattr(report, "EXPERIMENTS", ()), None, None
    trainings, table, warnings = read_trainings(run), job.images.table, [synthetic_note(run)]
    if job.is_current("tune"):
        path = run.path("score.json")
        score = read_json(path)
        check(isinstance(score, dict), f"{path}: damaged; delete it and run `tune` again")
        scores, headline = job.recipe.comparison.scores_by_fold(job), report.headline(job, score)
        own = [one for one in trainings if not one.stage.startswith(experiments)]
        hint = getattr(report, "hints", lambda *args: [])
        texts = find_hints(job, own, scores, hint(job, score, own))
        hints = page.section("What to try next", page.items(texts)) if texts else None
    else:
        stale = run.step("tune") is not None
        headline = [page.note("The score is out of date: run `tune` again." if stale else "No score yet: run `tune`.")]
    training = training_section(trainings, experiments, scores)
    rates = step_section(job, "find_lr", "Learning rates", _learning_rates)
    submission = step_section(job, "submit", "Submission", lambda job: _submission(job, report))
    if (table.loc[table["split"] == "train", "patient_id"] == "").all():
        text = "No patient ids: a patient may be in two folds, which would inflate the scores."
        warnings.append(page.note(text, "warning"))
    blend = step_section(job, "predict", "Members of the blend", _members) if job.is_blend else None
    parts = [*warnings, *headline, blend, hints, *report.sections(job), training, rates, submission, _about(run)]
    title = f"{report.TITLE}, preset {job.preset}"
    page.write_page(run.path("report.html"), title, f"run {run.folder.name}", [p for p in parts if p is not None])


def step_section(job, step, title, fragments):
    """Return a section of `fragments(job)` if the result of a step is current.

    Returns None for a step that was never run, and a note for a stale result.
    """
    if job.run.step(step) is None:
        return None
    if not job.is_current(step):
        return page.note(f"{title}: out of date, run `{step}` again.")
    return page.section(title, *fragments(job))


def synthetic_note(run):
    """Return a warning about scores on synthetic images, None for a run on real images."""
    if not run.step("prepare")["synthetic"]:
        return None
    return page.note("Synthetic radiographs: the scores only show that the pipeline works.", "warning")


def _learning_rates(job):
    figures = []
    for path in map(job.run.path, job.run.step("find_lr")["made"]):
        table, name = read_csv(path, ["lr", "loss", "suggestion"], dtype=float), path.stem.removeprefix("lr_")
        drawn = plots.lr_finder_plot(table["lr"], table["loss"], table["suggestion"].max())
        figures.append(page.figure(drawn, f"{name}: loss while the learning rate rises"))
    return [page.grid(*figures)]


def _members(job):
    score, how = job.run.step("predict")["score"], job.run.step("blend")
    boxes = "x_min" in read_parquet(job.run.path("oof.parquet"))
    means = f"Boxes fused above an overlap of {how['iou']:g}" if boxes else f"Average of each {how['average']}"
    found = "given weights" if how["weights"] else "weights searched out of fold, for each fold on the others"
    text = f"{means}; {found}; score {score:.4f}."
    caption = "Weight in the submission, score alone, score of the others without it, and what leaving it out costs"
    return [text, page.table(read_csv(job.run.path("blend.csv")), caption)]


def _submission(job, report):
    record = job.run.step("submit")
    if not record["rows"]:
        return ["No test images."]
    text, hidden = f"{record['rows']:,} rows; the file passes validation.", record["hidden"]
    if hidden:
        trivial = f"trivial submission {hidden['nothing']:.4f}"
        text += f" Score on the sample's hidden labels: {hidden['value']:.4f} ({trivial})."
    return [text, *report.submission(job, record)]


def _about(run):
    manifest = run.manifest
    steps = manifest.pop("steps", {})
    return page.section(
        "This run",
        page.details("Versions, inputs and seed", page.key_values(manifest)),
        page.details("Configuration", page.key_values(read_json(run.path("config.json")))),
        page.details("Steps", page.key_values(steps)),
    )
