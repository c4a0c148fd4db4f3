"""Where a network looks: its heat maps, and how much of them lies in the lungs."""

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common.data.loaders import eval_loader
from common.errors import InputError
from solutions.covid19.training import view_dataset


@torch.inference_mode()
def heat_maps(model, data, rows, config, view, device, workers=0, progress=True, margin=None):
    """Grad-CAM of one network on these rows, float32 (n, h, w) of its own feature map's size, in full precision.

    view: what the network was trained on. progress: shown; a string is its title. margin: as in `training.shown`.
    Raises InputError for no rows.
    """
    if not len(rows):
        raise InputError("no rows to draw heat maps of")
    model.to(device, memory_format=torch.channels_last).eval()
    loader = eval_loader(view_dataset(data, rows, config, view, margin), 2 * config.batch_size, workers)
    found, title = [], progress if isinstance(progress, str) else "heat maps"
    with tqdm(total=len(rows), desc=title, disable=not progress, leave=False) as bar:
        for images, _ in loader:
            found.append(model.heat(images.to(device)).cpu().numpy())
            bar.update(len(images))
    return np.concatenate(found)


def share_in_lungs(heat, mask):
    """The share of a heat map that lies in the lungs, a float in [0, 1]; NaN where the map is zero.

    heat: (h, w), finite and not negative, enlarged bilinearly to the mask's size. mask: (H, W), the lungs where it is
    not 0. The share of a map without any preference is `lung_area`, which is what to hold it against.
    """
    heat, mask = np.ascontiguousarray(heat, np.float32), _checked(mask)
    if heat.ndim != 2 or heat.size == 0 or not np.isfinite(heat).all() or heat.min() < 0:
        raise InputError(f"a heat map must be numbers (h, w) from 0 upwards, not {heat.shape}")
    if not heat.any():
        return np.nan
    heat = cv2.resize(heat / heat.max(), mask.shape[::-1], interpolation=cv2.INTER_LINEAR).astype(np.float64)
    return float(heat[mask].sum() / heat.sum())


def lung_area(mask):
    """The share of an image that is lung, a float in [0, 1]: the chance level of `share_in_lungs`."""
    return float(_checked(mask).mean())


def _checked(mask):
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0:
        raise InputError(f"a mask must be (H, W), not {mask.shape}")
    return mask != 0
