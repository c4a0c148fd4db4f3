"""Hints computed from a run's results: what to try next, each with its command-line option in backticks."""

from numbers import Real

from common.network import section_of
from common.paths import read_json
from common.report.page import interval_text

MOST = 3  # hints on a page
FEW = 6  # with fewer epochs, an early best one means nothing
EARLY = 1 / 3  # a best epoch within this share of the training is early


def find_hints(job, trainings, scores, own):
    """Return at most MOST hints, the most important ones first.

    trainings: the run's own; scores: a table of fold, images, estimate, low and high; own: the solution's hints.
    """
    config = job.config
    found = [*own, *_differing_folds(scores, config), *_epochs(config, job.recipe.networks(job), trainings)]
    rule = read_json(job.run.path("tuned.json")).get("rule")
    found += [*_ends_of_grids(config, rule), *_missing_folds(config)]
    return found[:MOST]


def _differing_folds(scores, config):
    """Yield a hint if the intervals of the best and the worst fold do not overlap."""
    known = list(scores.dropna().itertuples())
    best, worst = max(known, key=lambda one: one.low, default=None), min(known, key=lambda one: one.high, default=None)
    if best and best.low > worst.high:
        texts = [f"fold {one.fold} {interval_text(one.estimate, one.low, one.high)}" for one in (best, worst)]
        how = f"Look for what sets their images apart; `--seed {config.seed + 1}` draws other folds."
        yield f"Folds differ by more than their intervals: {', '.join(texts)}. {how}"


def _epochs(config, networks, trainings):
    """Yield a hint for each stage whose best epoch was the last one in most folds, or an early one in all."""
    options = {n.stage: (section_of(config, n), n.config) for n in networks if not n.starts_from}
    for stage, (option, fit) in options.items():
        best = [one.best for one in trainings if one.stage == stage and one.best]
        if not best or fit.epochs < 2:
            continue
        last = sum(epoch == fit.epochs for epoch in best)
        if last > len(best) / 2:
            how = f"train longer with `--{option}.epochs {2 * fit.epochs}`"
            yield f"The best epoch of {stage} was the last in {last} of {len(best)} folds: {how}."
        elif fit.epochs >= FEW and max(best) <= fit.epochs * EARLY and isinstance(fit.lr, Real):
            how = f"try a lower rate, `--{option}.lr {fit.lr / 3:.1g}`"
            yield f"{stage} was best by epoch {max(best)} of {fit.epochs} in every fold: {how}."


def _ends_of_grids(config, rule):
    """Yield a hint for each setting of the rule at an end of its grid, unless it is 0 or 1, the limits of its range."""
    parts = {part: vars(getattr(config, part)) for part in ("decision", "fusion") if rule and hasattr(config, part)}
    for part, name, values in ((part, *pair) for part, grids in parts.items() for pair in grids.items()):
        chosen = rule.get(name)
        if not isinstance(values, tuple) or len(values) < 2 or not isinstance(chosen, Real) or chosen in (0, 1):
            continue
        ordered = sorted(values)
        end, step = (0, ordered[0] - ordered[1]) if chosen == ordered[0] else (-1, ordered[-1] - ordered[-2])
        further = round(chosen + step, 6)
        if chosen == ordered[end] and further > 0 and (further < 1 or ordered[-1] > 1):
            found = f"The chosen {name.replace('_', ' ')}, {chosen:g}, is the {'highest' if end else 'lowest'} tried"
            grid = " ".join(f"{value:g}" for value in sorted([*values, further]))
            yield f"{found}: add `--{part}.{name.replace('_', '-')} {grid}`."


def _missing_folds(config):
    if len(config.folds) < config.n_folds:
        option = f"`--folds {' '.join(map(str, range(config.n_folds)))}`"
        how = f"{option} scores every image and averages as many networks"
        yield f"{len(config.folds)} of {config.n_folds} folds are trained: {how}."
