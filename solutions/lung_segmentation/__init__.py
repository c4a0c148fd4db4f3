"""Lung segmentation: a recipe, and a trained network that other solutions use.

    from solutions.lung_segmentation import load_segmenter, lung_boxes
    boxes = lung_boxes(load_segmenter().masks(images))

Heavy modules are imported on first use.
"""

import importlib

_POST = ("lung_region", "lung_boxes", "clean_up", "apply_gate")
_HOMES = {"load_segmenter": "segmenter"} | dict.fromkeys(_POST, "postprocess")
_HOMES |= dict.fromkeys(("find_lungs", "structures_of", "weights_file"), "segmenter")
_HOMES |= {"mask_network": "models", **dict.fromkeys(("fit_mask", "read_mask", "same_proportions"), "pairs")}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
