"""LinearProbe: solves its problem, scores like torchmetrics, and names bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from dse_ext.probes import LinearProbe


def separable(images=6, side=4, pixels=4, classes=3, dim=8, noise=0.0, seed=0):
    """Features that are one direction per class, and the pixel labels that go with them."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(classes, (images, side, side), generator=generator)
    labels = patches.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)
    directions = torch.linalg.qr(
        torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    ).Q[:classes]
    features = directions[patches.flatten(1)]
    features = features + noise * torch.randn(features.shape, generator=generator)
    return features, labels


def test_probe_finds_separable_classes():
    features, labels = separable()
    probe = LinearProbe(3).fit(features, labels)
    held_features, held_labels = separable(seed=1, noise=0.02)
    # Upsampled logits blur borders between patches, so score patch by patch.
    patch_labels = held_labels[:, ::4, ::4]
    assert torch.equal(probe.predict(held_features, (4, 4)), patch_labels)
    score = probe.score(held_features, patch_labels)
    assert score.miou == pytest.approx(1.0)
    assert score.pixel_accuracy == pytest.approx(1.0)
    assert score.class_iou == pytest.approx((1.0, 1.0, 1.0))


def test_features_without_information_give_chance():
    _, labels = separable(images=40)
    noise = torch.randn(40, 16, 8)
    probe = LinearProbe(3, l2=1e-2).fit(noise[:20], labels[:20])
    assert probe.score(noise[20:], labels[20:]).miou < 0.35


def test_solution_is_the_optimum():
    features, labels = separable(noise=0.5)
    l2 = 1e-2
    probe = LinearProbe(3, l2=l2).fit(features, labels)
    x = features.flatten(0, 1).double()
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    target = labels[:, ::4, ::4].flatten()
    weight = probe._weight.double().requires_grad_()
    bias = probe._bias.double().requires_grad_()
    loss = F.cross_entropy(F.linear(x, weight, bias), target) + l2 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3


def test_target_of_a_mixed_patch_is_the_share_of_its_pixels():
    # One patch per image, a quarter of class 1: the best constant logits are log shares.
    labels = torch.zeros(5, 4, 4, dtype=torch.long)
    labels[:, :2, :2] = 1
    probe = LinearProbe(2).fit(torch.ones(5, 1, 3), labels)
    p = probe.logits(torch.ones(1, 1, 3), (1, 1)).softmax(dim=1).flatten()
    assert p.tolist() == pytest.approx([0.75, 0.25], abs=1e-3)


def test_score_agrees_with_torchmetrics():
    features, labels = separable(noise=0.6)
    probe = LinearProbe(3).fit(features, labels)
    score = probe.score(features, labels, batch_size=4)
    guess = probe.predict(features, (16, 16))
    iou = MulticlassJaccardIndex(3, average="none")(guess, labels)
    assert score.class_iou == pytest.approx(iou.tolist(), rel=1e-5)
    assert score.miou == pytest.approx(float(iou.mean()), rel=1e-5)
    accuracy = MulticlassAccuracy(3, average="micro")(guess, labels)
    assert score.pixel_accuracy == pytest.approx(float(accuracy), rel=1e-5)
    assert 0.2 < score.miou < 0.99


def test_ignored_pixels_count_nowhere():
    features, labels = separable(noise=0.4)
    spoiled = labels.clone()
    spoiled[:, :8] = 255
    probe = LinearProbe(3, ignore_index=255).fit(features, spoiled)
    score = probe.score(features, spoiled)
    guess = probe.predict(features, (16, 16))
    iou = MulticlassJaccardIndex(3, ignore_index=255)(guess, spoiled)
    assert score.miou == pytest.approx(float(iou), rel=1e-5)
    assert score.miou > 0.5
    with pytest.raises(ValueError, match="at least one pixel that is not ignored"):
        LinearProbe(3, ignore_index=255).fit(features, torch.full_like(labels, 255))


def test_absent_class_does_not_count():
    features, labels = separable(classes=2)
    score = LinearProbe(5).fit(features, labels).score(features, labels)
    assert score.miou > 0.6
    assert sum(iou != iou for iou in score.class_iou) == 3


def test_constant_feature_is_harmless():
    features, labels = separable()
    features = torch.cat([features, torch.full((*features.shape[:2], 1), 7.0)], dim=2)
    probe = LinearProbe(3).fit(features, labels)
    assert torch.isfinite(probe.logits(features, (16, 16))).all()


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 4, 4).long(), r"features must have shape \(B, N, d\)"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 4, 4).long(), "square grid, got N = 5"),
        (torch.zeros(2, 4, 3), torch.zeros(3, 4, 4).long(), r"labels must have shape .* B = 2"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, 4), "labels must be integers, got torch.float32"),
        (torch.zeros(2, 4, 3), torch.full((2, 4, 4), 3), r"lie in \[0, 3\), got values from 3 to"),
        (torch.zeros(2, 4, 3), torch.full((2, 4, 4), -1), r"got values from -1 to -1"),
    ],
)
def test_bad_input_is_named(features, labels, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(3).fit(features, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"l2": -1.0}, r"l2 must be >= 0, got -1\.0"),
        ({"max_iter": 0}, "max_iter must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**{"num_classes": 3, **arguments})


def test_prediction_needs_a_fit():
    with pytest.raises(RuntimeError, match="fit the probe"):
        LinearProbe(3).predict(torch.zeros(1, 4, 3), (4, 4))
