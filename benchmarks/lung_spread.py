"""Whether the spread of views finds bad lung masks: Dice of the shipped network's held-out images by their spread."""

import os
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from common.data.folds import make_folds
from common.metrics.segmentation import dice_from_areas
from common.metrics.statistics import bootstrap
from solutions.lung_segmentation import load_segmenter
from solutions.lung_segmentation.pairs import find_pairs, read_masks


def main():
    """Print the rank correlation of spread and Dice, and the mean Dice when the most spread tenth is rejected."""
    folders = [Path(os.environ["CXR_REAL_DATA"], name) for name in ("lung_segmentation", "jsrt")]
    pairs = [pair for folder in folders for pair in find_pairs(folder) if pair.files_of("lungs_heart")]
    pairs.sort(key=lambda pair: pair.image_id)
    strata = np.unique([pair.dataset for pair in pairs], return_inverse=True)[1]
    folds = make_folds(strata, 10, [pair.patient_id for pair in pairs], seed=0)
    held_out = {pair.image_id: pair for pair, fold in zip(pairs, folds, strict=True) if fold == 0}
    segmenter = load_segmenter(device="cpu", tta=("flip", "scale"), spread=True)

    def measure(image_id, image, probs):
        truth = read_masks(held_out[image_id].files_of("lungs_heart"), image.shape)[0][:2].max(0)
        mask, small = segmenter.lungs(probs[:-1], image.shape), segmenter.lungs(probs[:-1], probs.shape[1:])
        dice = dice_from_areas((mask & truth).sum(), mask.sum(), truth.sum())
        return float(dice), probs[-1].sum(dtype=float) / 510 / max(small.sum(), 1), small.mean()

    found = {name: pair.image for name, pair in held_out.items()}
    dice, spread, area = np.array([result for _, result, _ in segmenter.each(found, measure)]).T
    for name, values in (("spread", -spread), ("area, of which the gate asks", area)):
        pick = bootstrap(lambda rows, v=values: spearmanr(v[rows], dice[rows])[0], np.arange(len(dice)), seed=0)
        kept = values >= np.quantile(values, 0.1)
        worst = dice < np.quantile(dice, 0.1)
        text = f"Spearman with Dice {pick}; without the worst tenth by it Dice {dice[kept].mean():.4f}"
        print(f"{name}: {text}, and {(worst & ~kept).sum()} of the {worst.sum()} lowest Dice are gone")
    quantiles = ", ".join(f"{value:.4f}" for value in np.quantile(spread, (0.1, 0.5, 0.9, 1)))
    print(f"{len(dice)} held-out images, Dice {dice.mean():.4f}; spread at 10, 50, 90 and 100 %: {quantiles}")


if __name__ == "__main__":
    main()
