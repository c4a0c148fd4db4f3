"""Sections that the page of every run has: its trainings, its learning rates, what it was made with."""

import pandas as pd

from common.paths import read_csv, read_json
from common.report import page, plots


def synthetic(context):
    """The warning that scores on phantoms show nothing else than a working pipeline, or None for real images."""
    if not context.run.manifest["steps"]["prepare"]["synthetic"]:
        return None
    return page.note("Synthetic radiographs: the scores show that the pipeline works, nothing else.", "warning")


def training(context, aside=""):
    """Learning curves and averaging variants of every training of the run; a list of one section, or of none.

    aside: begin of the stages' names whose curves are folded, such as those of further experiments.
    """
    figures, more, rows = [], [], []
    for folder in sorted(context.run.folder.glob("*/*")):
        if not (folder / "history.csv").is_file():
            continue
        history = read_csv(folder / "history.csv", ["epoch"])
        history["epoch"] += 1  # people count from 1
        name = f"{folder.parent.name}, {folder.name}"
        chosen = None
        if (folder / "variants.json").is_file():
            summary = read_json(folder / "variants.json")
            epochs = summary["variants"][summary["chosen"]]["epochs"]
            chosen = (min(epochs) + 1, max(epochs) + 1) if epochs else None
            metric = summary["metric"].lstrip("-")
            for variant, figures_of in summary["variants"].items():
                shown = ", ".join(str(e + 1) for e in figures_of["epochs"]) or "every step"
                kept = "kept" if variant == summary["chosen"] else ""
                rows.append((name, variant, shown, metric, figures_of[metric], kept))
        curves = more if aside and folder.name.startswith(aside) else figures
        curves.append(page.figure(plots.learning_curves(history, chosen), f"{name}; shaded: the epochs kept"))
    if not figures:
        return []
    table = pd.DataFrame(rows, columns=["training", "weights", "epochs", "metric", "validation", ""])
    fragments = [page.grid(*figures), page.table(table, "Averages of weights compared on validation")]
    if more:
        fragments.append(page.details(f"{len(more)} trainings of experiments", page.grid(*more)))
    return [page.section("Training", *fragments)]


def learning_rates(run):
    """The range tests of the run, or None."""
    figures = []
    for path in sorted(run.folder.glob("lr_*.csv")):
        table, name = read_csv(path, ["lr", "loss", "suggestion"]), path.stem.removeprefix("lr_")
        drawn = plots.lr_finder_plot(table["lr"], table["loss"], table["suggestion"].iloc[0])
        figures.append(page.figure(drawn, f"{name}: the loss while the rate rises"))
    return page.section("Learning rates", page.grid(*figures)) if figures else None


def about(run):
    """Versions, configuration and steps, folded."""
    manifest = run.manifest
    steps = manifest.pop("steps", {})
    config = read_json(run.path("config.json"))
    return page.section(
        "This run",
        page.details("Versions, inputs and seed", page.key_values(manifest)),
        page.details("Configuration", page.key_values(config)),
        page.details("Steps", page.key_values(steps)),
    )
