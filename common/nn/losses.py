"""Losses on logits, computed in float32 even under autocast.

logits: (B, C, H, W) or (B, C). target: the same shape, or without the channel if C is 1; any dtype, values in [0, 1].
Every function returns a scalar and raises ValueError for shapes that do not match.
"""

import cv2
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F


def bce(logits, target, pos_weight=None):
    """Return the mean binary cross-entropy; pos_weight, a number or (C,), multiplies the positives' terms."""
    logits, target = _match_shapes(logits, target)
    if pos_weight is not None:
        pos_weight = torch.as_tensor(pos_weight, dtype=torch.float32, device=logits.device)
        pos_weight = pos_weight.reshape(-1, *[1] * (logits.ndim - 2))
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=pos_weight)


def focal_bce(logits, target, gamma=2.0, pos_weight=1.0):
    """Return the mean cross-entropy times (1 − p_true)^gamma (Lin et al. 2017, α = pos_weight / (1 + pos_weight))."""
    logits, target = _match_shapes(logits, target)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = target + torch.sigmoid(logits) * (1 - 2 * target)
    loss = entropy * wrong.clamp_min(1e-6) ** gamma  # for gamma < 1, the gradient at 0 would be infinite
    return (loss * (1 + (pos_weight - 1) * target)).mean()


def asymmetric(logits, target, gamma_negative=4.0, gamma_positive=1.0, margin=0.05):
    """Return the mean asymmetric loss (Ridnik et al. 2021; the defaults are their values for multi-label data).

    As in focal losses, positives weigh (1 − p)^gamma_positive and negatives p^gamma_negative, p less `margin`.
    """
    logits, target = _match_shapes(logits, target)
    probs = torch.sigmoid(logits)
    easier = (probs - margin).clamp_min(0)
    positive = target * F.logsigmoid(logits) * (1 - probs) ** gamma_positive
    return -(positive + (1 - target) * torch.log1p(-easier) * easier**gamma_negative).mean()


def pairwise_auc(logits, target, margin=1.0):
    """Return a surrogate for 1 − AUROC of a batch (B, C): a squared hinge over pairs, averaged over classes with pairs.

    A pair contributes max(0, margin − positive's logit + negative's)² (Yuan et al. 2021). Labels > 0.5 are positive.
    """
    logits, target = _match_shapes(logits, target)
    pairs = ((target > 0.5)[:, None] & (target <= 0.5)[None]).float()
    hinge = (margin - logits[:, None] + logits[None]).clamp_min(0).square()
    counts = pairs.sum((0, 1))
    return ((pairs * hinge).sum((0, 1)) / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def dice(logits, target, smooth=1.0, squared=False):
    """Return the mean of 1 − (2·overlap + smooth) / (sizes + smooth); squared: sum squares (Milletari 2016)."""
    probs, target = _flat_probs(logits, target)
    size = (probs.square() + target.square() if squared else probs + target).sum(1)
    return (1 - (2 * (probs * target).sum(1) + smooth) / (size + smooth)).mean()


def tversky(logits, target, alpha=0.3, beta=0.7, smooth=1.0, gamma=1.0):
    """Return the mean of (1 − tp / (tp + alpha·fp + beta·fn))^gamma, smoothed (Salehi et al. 2017)."""
    probs, target = _flat_probs(logits, target)
    tp = (probs * target).sum(1)
    wrong = alpha * (probs.sum(1) - tp) + beta * (target.sum(1) - tp)
    return ((wrong / (tp + wrong + smooth)).clamp_min(1e-6 if gamma != 1 else 0) ** gamma).mean()


def lovasz_hinge(logits, target):
    """Return the mean convex surrogate of 1 − IoU at logit 0, for targets of 0 or 1 (Berman et al. 2018)."""
    flat = (part.flatten(2).flatten(0, 1) for part in _match_shapes(logits, target))
    return smp.losses.LovaszLoss("binary", per_image=True)(*flat)


def boundary(logits, target):
    """Return the mean of probability times signed distance to the outline, in sides of the image (Kervadec 2019).

    target: 0 or 1; the distances of an image without a mask are 0.
    """
    logits, target = _match_shapes(logits, target)
    far = []
    for mask in target.flatten(0, 1).byte().cpu().numpy():
        outside, inside = (cv2.distanceTransform(each, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for each in (1 - mask, mask))
        far.append(torch.from_numpy((outside - inside) / max(mask.shape) * bool(mask.any())))
    return (torch.sigmoid(logits) * torch.stack(far).reshape(target.shape).to(logits.device)).mean()


def focal_dice(logits, target, gamma=2.0, pos_weight=1.0, focal_weight=1.0):
    """Return the sum of focal cross-entropy, times `focal_weight`, and Dice: the pneumothorax paper's loss."""
    return focal_weight * focal_bce(logits, target, gamma, pos_weight) + dice(logits, target)


def bce_dice(logits, target, pos_weight=None):
    """Return `bce` plus `dice`."""
    return bce(logits, target, pos_weight) + dice(logits, target)


def combo(logits, target, weights=(3.0, 1.0, 4.0), gamma=2.0, pos_weight=None):
    """Return the weighted sum of cross-entropy, Dice and focal cross-entropy; 3:1:4 is from SIIM's first place."""
    parts = bce(logits, target, pos_weight), dice(logits, target), focal_bce(logits, target, gamma)
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def _match_shapes(logits, target):
    if target.ndim == logits.ndim - 1 and logits.shape[1] == 1:
        target = target.unsqueeze(1)
    if target.shape != logits.shape:
        raise ValueError(f"target {tuple(target.shape)} does not fit logits {tuple(logits.shape)}")
    return logits.float(), target.float()


def _flat_probs(logits, target):
    """Return probabilities and target as float32 (B·C, H·W)."""
    logits, target = (part.flatten(2).flatten(0, 1) for part in _match_shapes(logits, target))
    return torch.sigmoid(logits), target
