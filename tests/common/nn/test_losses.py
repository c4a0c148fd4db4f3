import itertools
import math

import pytest
import segmentation_models_pytorch as smp
import torch
from torchvision.ops import sigmoid_focal_loss

from common.nn import losses

LN3 = math.log(3)  # sigmoid(ln 3) = 3/4
LABELS = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
COLUMNS = torch.tensor([[2, 2, 5.0], [0.5, 1, 5], [-1, 1.5, 5]])
SEGMENTATION = [losses.bce, losses.focal_bce, losses.dice, losses.tversky, losses.lovasz_hinge, losses.focal_dice]
SEGMENTATION += [losses.combo]


def row(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def random_case(seed=0, shape=(3, 2, 9, 7)):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng) * 2, (torch.rand(shape, generator=rng) < 0.3).float()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (losses.bce(row(LN3, -LN3), row(1, 1)), (-math.log(0.75) - math.log(0.25)) / 2),
        (losses.bce(row(LN3, -LN3), row(1, 0), pos_weight=3.0), -math.log(0.75) * (3 + 1) / 2),
        # distances of the three pixels from the first one's outline: -1, 1 and 2, of a side of 3
        (losses.boundary(row(LN3, LN3, -LN3), row(1, 0, 0)), (-0.75 + 0.75 + 0.25 * 2) / 3 / 3),
        (losses.boundary(row(LN3), row(0)), 0.0),
        (losses.focal_bce(row(LN3), row(1), gamma=2.0), -(0.25**2) * math.log(0.75)),
        (losses.focal_bce(row(LN3), row(0), gamma=1.0, pos_weight=9.0), -0.75 * math.log(0.25)),
        (losses.asymmetric(row(LN3), row(1), gamma_positive=2.0), -(0.25**2) * math.log(0.75)),
        (losses.asymmetric(row(LN3), row(0), gamma_negative=3.0, margin=0.25), -(0.5**3) * math.log(0.5)),
        (losses.asymmetric(row(-LN3), row(0), margin=0.25), 0.0),  # a negative that is easy enough
        # class 1: 2 and 0.5 lie far enough above −1; class 2: 1 and 1.5 lie below 2; class 3: no positive
        (losses.pairwise_auc(COLUMNS, LABELS), (0 + (2.0**2 + 1.5**2) / 2) / 2),
        (losses.pairwise_auc(COLUMNS[:, :1], torch.tensor([[0.4], [0.9], [0.1]])), (2.5**2 + 0) / 2),
        (losses.pairwise_auc(COLUMNS, torch.zeros(3, 3)), 0.0),
        # probabilities 3/4, 1/4 on mask 1, 0: overlap 3/4, sizes 1 and 1
        (losses.dice(row(LN3, -LN3), row(1, 0), smooth=0), 1 - 2 * 0.75 / 2),
        (losses.dice(row(LN3, -LN3), row(1, 0), smooth=1), 1 - 2.5 / 3),
        (losses.dice(row(LN3, -LN3), row(1, 0), smooth=0, squared=True), 1 - 1.5 / (9 / 16 + 1 / 16 + 1)),
        # tp 3/4, fp 1/4, fn 1/4
        (losses.tversky(row(LN3, -LN3), row(1, 0), alpha=0.2, beta=0.8, smooth=0), 1 - 0.75 / (0.75 + 0.25)),
        (losses.tversky(row(LN3, LN3), row(1, 0), alpha=0.2, beta=0.8, smooth=0), 1 - 0.75 / (0.75 + 0.15 + 0.2)),
        (losses.tversky(row(LN3, LN3), row(1, 0), 0.2, 0.8, 0, gamma=0.5), math.sqrt(1 - 0.75 / 1.1)),
        # errors 3 (negative, wrong) and 0.5 (positive): first step 1 − 1/2, second 1/2
        (losses.lovasz_hinge(row(0.5, 2), row(1, 0)), 3 * 0.5 + 0.5 * 0.5),
        (losses.lovasz_hinge(row(1, -3), row(0, 0)), 2.0),  # empty mask: the worst error alone
    ],
)
def test_hand_computed(value, expected):
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_focal_equals_torchvision():
    logits, target = random_case()
    for gamma, alpha in ((2.0, 0.25), (0.0, 0.7), (1.5, -1)):
        ours = losses.focal_bce(logits, target, gamma, 1.0 if alpha < 0 else alpha / (1 - alpha))
        ours *= 1.0 if alpha < 0 else 1 - alpha
        torch.testing.assert_close(ours, sigmoid_focal_loss(logits, target, alpha, gamma, "mean"), rtol=1e-4, atol=1e-6)


def test_lovasz_at_a_sharp_prediction_is_one_minus_iou():
    prediction, target = row(1, 1, 1, 0, 0), row(1, 1, 0, 1, 0)
    # with margin errors of 0 or 2, half the loss is the Jaccard loss of the mistakes: 1 − 2/4
    assert losses.lovasz_hinge(2 * prediction - 1, target).item() / 2 == pytest.approx(0.5)


def test_dice_of_one_image_equals_smp():
    logits, target = random_case(shape=(1, 2, 9, 7))
    theirs = smp.losses.DiceLoss("multilabel", smooth=0.0)(logits, target)
    torch.testing.assert_close(losses.dice(logits, target, smooth=0), theirs)


def test_tversky_of_one_half_is_dice_with_twice_the_smoothing():
    logits, target = random_case()
    half = losses.tversky(logits, target, 0.5, 0.5, smooth=1)
    torch.testing.assert_close(half, losses.dice(logits, target, smooth=2))


@pytest.mark.parametrize("loss", [losses.dice, losses.tversky, losses.lovasz_hinge])
def test_the_loss_is_the_mean_over_images_and_channels(loss):
    logits, target = random_case()
    single = [loss(logits[i : i + 1, c : c + 1], target[i : i + 1, c : c + 1]) for i in range(3) for c in range(2)]
    torch.testing.assert_close(loss(logits, target), torch.stack(single).mean())


def test_combo_weighs_three_one_four():
    logits, target = random_case()
    expected = 3 * losses.bce(logits, target) + losses.dice(logits, target) + 4 * losses.focal_bce(logits, target)
    torch.testing.assert_close(losses.combo(logits, target), expected)
    expected = 0.25 * losses.focal_bce(logits, target, pos_weight=3.0) + losses.dice(logits, target)
    torch.testing.assert_close(losses.focal_dice(logits, target, pos_weight=3.0, focal_weight=0.25), expected)


@pytest.mark.parametrize("loss", SEGMENTATION)
def test_the_better_prediction_scores_lower(loss):
    target = row(1, 1, 0, 0)
    scores = [loss(row(*values), target) for values in ((9, 9, -9, -9), (9, 9, 9, -9), (-9, 9, 9, -9), (-9, -9, 9, 9))]
    assert all(better < worse for better, worse in itertools.pairwise(scores))
    assert scores[0] < 0.02


@pytest.mark.parametrize(
    "loss", [*SEGMENTATION, lambda x, y: losses.tversky(x, y, gamma=0.75), lambda x, y: losses.focal_bce(x, y, 0.5)]
)
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("fill", [0.0, 1.0, "mixed"])
def test_gradients_are_finite_at_extremes_and_empty_masks(loss, size, fill):
    logits = (size * row(1, -1, 1, -1)).requires_grad_()
    target = row(1, 1, 0, 0) if fill == "mixed" else torch.full((1, 1, 1, 4), fill)
    value = loss(logits, target)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", SEGMENTATION)
def test_low_precision_logits_and_any_target_type_are_computed_in_float32(loss):
    logits, target = random_case(shape=(2, 1, 8, 8))
    logits = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(logits, target[:, 0].to(torch.uint8))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(logits.float(), target))


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"target \(2, 1, 8, 9\) does not fit logits \(2, 1, 8, 8\)"):
        losses.dice(torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 9))


def test_positives_can_be_weighted_by_class():
    labels = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 1]])
    weighted = losses.bce(torch.zeros(4, 2), labels, torch.tensor([3.0, 1.0]))
    # class 0: (3 + 1+1+1)/4 = 1.5, class 1: (1+1+1+1)/4 = 1, times ln 2
    assert weighted.item() == pytest.approx(1.25 * math.log(2))
