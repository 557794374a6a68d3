"""The losses that lightly lacks, and the masks, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dse_ext.ssl.methods.esvit import region_matching
from dse_ext.ssl.methods.masking import block_mask, context_and_targets
from dse_ext.ssl.methods.mec import coding_length
from dse_ext.ssl.methods.mugs import LocalGroup
from dse_ext.ssl.methods.parts import follow, full_precision, info_nce, memory_bank, teacher_of
from dse_ext.ssl.methods.resa import self_assignment

CPU = torch.device("cpu")


@pytest.mark.parametrize(("m", "d"), [(6, 10), (10, 6)])
def test_coding_length_is_the_log_determinant(m, d):
    """With terms enough the series is (m + d)/2m · log det(I + λ Z₁ᵀ Z₂)."""
    z = F.normalize(torch.randn(m, d, dtype=torch.float64), dim=1)
    other = F.normalize(z + 0.1 * torch.randn_like(z), dim=1)
    distortion = 2.0
    matrix = torch.eye(d, dtype=torch.float64) + z.T @ other / (m * distortion)
    expected = (m + d) / (2 * m) * torch.linalg.slogdet(matrix).logabsdet
    assert torch.allclose(coding_length(z, other, distortion, 60), expected, rtol=1e-10)
    first = (m + d) / (2 * m) * (z * other).sum() / (m * distortion)
    assert torch.allclose(coding_length(z, other, distortion, 1), first)


def test_coding_length_prefers_spread_embeddings():
    spread = torch.eye(8)
    collapsed = torch.ones(8, 8)
    assert coding_length(spread, spread, 0.25, 4) > coding_length(collapsed, collapsed, 0.25, 4)


def test_region_matching_by_loops():
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    features, others = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    center = torch.randn(1, 1, 5)
    total = 0.0
    for b in range(2):
        for i in range(3):
            similarity = F.cosine_similarity(features[b, i][None], others[b])
            target = F.softmax((teacher[b, similarity.argmax()] - center[0, 0]) / 0.05, dim=0)
            total -= float((target * F.log_softmax(student[b, i] / 0.1, dim=0)).sum())
    loss = region_matching(student, teacher, features, others, center, 0.1, 0.05)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)


def test_self_assignment_is_cross_entropy_with_a_doubly_stochastic_matrix():
    torch.manual_seed(4)
    z, other = torch.randn(6, 4), torch.randn(6, 4)
    # Encodings that are orthogonal: every image is a cluster by itself.
    loss = self_assignment(z, other, torch.eye(6), 0.4, 0.05, 3)
    assert loss.item() == pytest.approx(info_nce(z, other, None, 0.4).item(), rel=1e-4)
    # Encodings that are equal: one cluster, a uniform assignment.
    logits = F.normalize(z, dim=1) @ F.normalize(other, dim=1).T / 0.4
    uniform = -F.log_softmax(logits, dim=1).mean()
    assert self_assignment(z, other, torch.ones(6, 3), 0.4, 0.05, 3).item() == pytest.approx(
        uniform.item(), rel=1e-4
    )
    encodings = torch.randn(6, 3, requires_grad=True)
    z.requires_grad_()
    self_assignment(z, other, encodings, 0.4, 0.05, 3).backward()
    assert encodings.grad is None
    assert z.grad.abs().max() > 0


def test_info_nce_with_and_without_a_bank():
    torch.manual_seed(5)
    q, k, bank = torch.randn(4, 3), torch.randn(4, 3), torch.randn(7, 3)
    unit_q, unit_k, unit_bank = (F.normalize(t, dim=1) for t in (q, k, bank))
    by_hand = 0.0
    for i in range(4):
        negatives = [math.exp(float(unit_q[i] @ n) / 0.2) for n in unit_bank]
        positive = math.exp(float(unit_q[i] @ unit_k[i]) / 0.2)
        by_hand -= math.log(positive / (positive + sum(negatives))) / 4
    assert info_nce(q, k, bank, 0.2).item() == pytest.approx(by_hand, rel=1e-5)
    logits = unit_q @ unit_k.T / 0.2
    assert torch.allclose(info_nce(q, k, None, 0.2), F.cross_entropy(logits, torch.arange(4)))


def test_local_group_takes_the_nearest_neighbours():
    group = LocalGroup(4, heads=3, output_dim=2).eval()  # 3 does not divide 4: fewer heads
    assert group.block.self_attn.num_heads == 2
    bank = torch.cat([torch.eye(4), -torch.eye(4)])
    features = torch.tensor([[1.0, 0.1, 0.0, 0.0]])
    nearest = group(features, bank, 1)
    assert torch.allclose(nearest, group(features, bank[:1], 1), atol=1e-6)
    assert not torch.allclose(nearest, group(features, bank[3:4], 1))


def test_memory_bank_is_part_of_the_state():
    bank = memory_bank(4, 3)
    before = bank.bank.clone()
    _, seen = bank(torch.ones(2, 3), update=True)
    assert torch.equal(seen, before)
    other = memory_bank(4, 3)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.bank, bank.bank)
    assert int(other.bank_ptr) == 2
    assert torch.equal(bank.bank[:2], torch.ones(2, 3))


def test_losses_are_computed_in_float32_under_autocast():
    seen = []

    def loss(a, b):
        seen.extend([a.dtype, b[0].dtype, torch.is_autocast_enabled("cpu")])
        return (a @ b[0].T).sum()[None]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = full_precision(loss, torch.ones(2, 2).bfloat16(), [torch.ones(2, 2).half()])
    assert seen == [torch.float32, torch.float32, False]
    assert result.shape == ()
    assert result.item() == 8


def test_teacher_follows_without_dropout():
    student = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    teacher = teacher_of(student)
    assert teacher[1].p == 0
    assert student[1].p == 0.5
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        student[0].bias.add_(1.0)
    old = teacher[0].bias.clone()
    follow([(student, teacher)], 0, 10, 0.9)
    assert torch.allclose(teacher[0].bias, old + 0.1)
    follow([(student, teacher)], 9, 10, 0.9)  # the momentum has risen to 1
    assert torch.allclose(teacher[0].bias, old + 0.1)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("grid", [2, 3, 4, 6, 14])
def test_block_masks_keep_to_their_shares(grid):
    mask = block_mask(16, grid, 0.5, 0.5, CPU)
    assert mask.shape == (16, grid, grid)
    assert mask.any()
    masked = mask.flatten(1).sum(dim=1)
    assert (masked > 0).sum() <= 8
    assert masked.max() <= max(grid * grid // 2, 1)


@pytest.mark.parametrize("grid", [1, 2, 4, 6, 14])
def test_context_has_no_patch_of_a_target(grid):
    torch.manual_seed(grid)
    context, targets = context_and_targets(5, grid, 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), CPU)
    assert len(targets) == 4
    assert len({t.shape for t in targets}) == 1
    assert context.shape[0] == 5
    assert context.shape[1] >= 1
    for row, *blocks in zip(context, *targets, strict=True):
        assert len(set(row.tolist())) == len(row)
        assert 0 <= int(row.min()) <= int(row.max()) < grid * grid
        hidden = {int(i) for block in blocks for i in block}
        if grid > 2:
            assert not hidden & set(row.tolist())
        for block in blocks:  # a rectangle
            rows, columns = block // grid, block % grid
            height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
            assert height * width == len(block)
    if grid == 14:
        assert 0.1 < len(targets[0][0]) / 196 < 0.25
