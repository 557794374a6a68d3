"""The reference that the library is compared with is right itself."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from features import CLOUDS, normal, random_labels, rank_collapsed
from peer import run_lightly

LINE = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]], dtype=torch.float64)
LINE_LABELS = torch.tensor([[0, 0, 1, 1]])


def test_nuclear_norm_of_two_rows_is_their_distance_over_root_two() -> None:
    rows = torch.tensor([[1.0, 2.0, 2.0], [1.0, 5.0, 6.0]], dtype=torch.float64)
    assert float(oracle.centered_nuclear_norm(rows)) == pytest.approx(5 / math.sqrt(2))


def test_nuclear_norm_of_a_centred_diagonal_is_the_sum_of_its_entries() -> None:
    rows = torch.tensor([[3.0, 0], [-3, 0], [0, 4], [0, -4]], dtype=torch.float64)
    assert float(oracle.centered_nuclear_norm(rows)) == pytest.approx(7 * math.sqrt(2))


def test_effective_rank_of_orthogonal_rows_is_their_number() -> None:
    assert float(oracle.effective_rank(torch.eye(3, 7, dtype=torch.float64))) == pytest.approx(3)


def test_effective_rank_of_one_direction_is_one() -> None:
    assert float(oracle.effective_rank(LINE[0])) == pytest.approx(1)


def test_effective_rank_of_unequal_singular_values_is_exp_of_their_entropy() -> None:
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    x = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert float(oracle.effective_rank(x)) == pytest.approx(math.exp(entropy))


def test_four_points_on_a_line_by_hand_regularizer() -> None:
    c = oracle.dse_components(LINE, LINE_LABELS, LINE_LABELS, normalize=False)
    # Mean 5.5, distances 5.5, 4.5, 4.5, 5.5; centroids 0.5 and 10.5; radius sqrt(1/4 + 1/4).
    assert c.avg_norm.item() == pytest.approx(5)
    assert c.m_inter.item() == pytest.approx(10 / 5)
    assert c.m_intra_image.item() == pytest.approx(math.sqrt(0.5) / 5)
    assert c.m_intra_batch.item() == pytest.approx(math.sqrt(0.5) / 5)
    assert c.m_dim.item() == pytest.approx(1)
    assert c.score(2.0).item() == pytest.approx(2 + 2 - math.sqrt(0.5) / 5)


def test_four_points_on_a_line_by_hand_paper() -> None:
    labels = torch.tensor([[0, 0, 0, 1]])
    c = oracle.dse_components(LINE, labels, labels, variant="paper", normalize=False)
    # Centroids 11/3 and 11. Distances to the other: 11, 10, 1 (squares 121, 100, 1) and 22/3.
    assert c.m_inter.item() == pytest.approx(((121 + 100 + 1) / 3 + (22 / 3) ** 2) / 2)
    spread = (11 / 3) ** 2 + (8 / 3) ** 2 + (19 / 3) ** 2
    assert c.m_intra_image.item() == pytest.approx(math.sqrt(spread) / 2)
    assert c.m_dim.item() == pytest.approx(1)


def test_evaluation_takes_the_rank_over_images_at_each_permuted_position() -> None:
    # Two images of two positions: unpermuted, position 0 is e1, e1 and position 1 is e2, e2 (rank
    # one each); with the second image swapped both are e1, e2 (rank two each).
    e1, e2 = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    z = torch.tensor([[e1, e2], [e1, e2]], dtype=torch.float64)
    straight, swapped = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 1], [1, 0]])
    assert float(oracle.dimensionality(z, "evaluation", straight)) == pytest.approx(1 / 2)
    assert float(oracle.dimensionality(z, "evaluation", swapped)) == pytest.approx(2 / 2)
    assert float(oracle.dimensionality(z, "regularizer", None)) == pytest.approx(2 / 3)


def test_clusters_of_one_row_have_no_radius() -> None:
    labels = torch.tensor([[0, 0, 1, 2]])
    c = oracle.dse_components(LINE, labels, labels, normalize=False)
    assert c.m_intra_image.item() == pytest.approx(math.sqrt(0.5) / 5)


def test_components_without_terms_are_zero() -> None:
    labels = torch.tensor([[0, 0, 0, 0]])
    assert float(oracle.dse_components(LINE, labels, labels).m_inter) == 0
    labels = torch.tensor([[0, 1, 2, 3]])
    c = oracle.dse_components(LINE, labels, labels)
    assert c.m_intra_image.item() == c.m_intra_batch.item() == 0


def test_a_given_centroid_that_is_not_finite_is_no_centroid() -> None:
    centroids = torch.tensor([[[0.5], [10.5], [float("nan")]]], dtype=torch.float64)
    c = oracle.dse_components(LINE, LINE_LABELS, LINE_LABELS, centroids, normalize=False)
    assert c.m_inter.item() == pytest.approx(2)


def test_an_unused_given_centroid_counts_as_a_neighbour() -> None:
    centroids = torch.tensor([[[0.5], [10.5], [3.0]]], dtype=torch.float64)
    c = oracle.dse_components(LINE, LINE_LABELS, LINE_LABELS, centroids, normalize=False)
    assert c.m_inter.item() == pytest.approx((3 + 2 + 7 + 8) / 4 / 5)


def test_the_last_group_may_be_smaller() -> None:
    z = normal(3, 4, 2)
    labels = random_labels(3, 4, 2, seed=1)
    c = oracle.dse_components(z, labels, labels, group_images=2, normalize=False)
    first = oracle.radii(z[:2].reshape(8, 2), labels[:2].reshape(8), "regularizer")
    last = oracle.radii(z[2], labels[2], "regularizer")
    expected = sum(float(r) for r in first + last) / len(first + last) / c.avg_norm.item()
    assert len(first) == 2
    assert len(last) >= 1
    assert c.m_intra_batch.item() == pytest.approx(expected)


def test_paper_averages_over_the_clusters_of_all_groups_alike() -> None:
    """A group with fewer clusters has fewer terms, not heavier ones."""
    z = torch.tensor([[[0.0], [2.0]], [[4.0], [9.0]], [[0.0], [1.0]]], dtype=torch.float64)
    labels = torch.tensor([[0, 1], [2, 2], [0, 1]])
    c = oracle.dse_components(z, labels, labels, variant="paper", group_images=2, normalize=False)
    # Centroids 0, 2, 6.5 and 0, 1: squares 4 | 4 | (2^2 + 7^2) / 2 and 1 | 1.
    assert c.m_inter.item() == pytest.approx((4 + 4 + 26.5 + 1 + 1) / 5)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_singular_values_and_their_derivative_match_svdvals(shape: tuple[int, int]) -> None:
    x = normal(*shape).requires_grad_()
    weights = torch.arange(1.0, min(shape) + 1, dtype=torch.float64)
    (ours,) = torch.autograd.grad((oracle.singular_values(x) * weights).sum(), x)
    (theirs,) = torch.autograd.grad((torch.linalg.svdvals(x) * weights).sum(), x)
    torch.testing.assert_close(oracle.singular_values(x), torch.linalg.svdvals(x))
    torch.testing.assert_close(ours, theirs)


def test_nuclear_norm_derivative_at_deficient_rank_is_the_smallest_subgradient() -> None:
    x = rank_collapsed(1, 9, 6)[0].requires_grad_()
    norm = oracle.singular_values(x).sum()
    (g,) = torch.autograd.grad(norm, x)
    assert (g * x).sum().item() == pytest.approx(norm.item())
    torch.testing.assert_close(
        torch.linalg.svdvals(g), torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64)
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_gradcheck(variant: str, normalize: bool) -> None:
    local, shared = random_labels(3, 5, 2), random_labels(3, 5, 4, seed=1)
    centroids, order = normal(2, 4, 3, seed=2), torch.stack([torch.randperm(5) for _ in range(3)])

    def components(z: torch.Tensor) -> oracle.Components:
        return oracle.dse_components(
            z,
            local,
            shared,
            centroids,
            variant=variant,
            group_images=2,
            normalize=normalize,
            permutation=order,
        )

    assert torch.autograd.gradcheck(components, normal(3, 5, 3, seed=3).requires_grad_())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("cloud", ["random", "clustered", "low_rank", "nearly_collapsed"])
def test_agrees_with_lightly_on_the_same_clusters(cloud: str, normalize: bool) -> None:
    z = CLOUDS[cloud](7, 11, 6)
    peer = run_lightly(z, local_clusters=3, global_clusters=9, normalize=normalize)
    z = z.requires_grad_()
    c = oracle.dse_components(
        z,
        peer.local_labels,
        peer.global_labels,
        peer.global_centroids,
        group_images=3,
        normalize=normalize,
    )
    (gradient,) = torch.autograd.grad(-c.score(), z)
    # lightly guards its quotients and logarithms with 1e-12.
    torch.testing.assert_close(-c.score(), peer.loss, rtol=1e-8, atol=0)
    error = (gradient - peer.gradient).norm() / peer.gradient.norm()
    assert float(error) < 1e-6
