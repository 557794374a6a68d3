"""λ over a run and the choice of checkpoints."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dse_ext import dse_lambda, select_checkpoints

RELEVANCE = [0.11, 0.35, 0.27, -0.2, 0.4]
DIMENSIONALITY = [0.52, 0.44, 0.47, 0.61, 0.58]

CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "tensor": lambda v: torch.tensor(v, dtype=torch.float64),
    "tensors": lambda v: [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in v],
    "scalars": lambda v: [np.float64(x) for x in v],
}


def at_nan(values: list[float], index: int, value: float = math.nan) -> list[float]:
    return [value if i == index else v for i, v in enumerate(values)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_lambda_is_the_ratio_of_standard_deviations(container):
    convert = CONTAINERS[container]
    weight = dse_lambda(convert(RELEVANCE), convert(DIMENSIONALITY))
    assert isinstance(weight, float)
    for std in (statistics.pstdev, statistics.stdev):  # the degrees of freedom cancel
        assert weight == pytest.approx(std(RELEVANCE) / std(DIMENSIONALITY), rel=1e-12)


def test_lambda_takes_containers_of_two_kinds():
    assert dse_lambda(np.array([0, 4]), torch.tensor([1.0, 3.0], dtype=torch.bfloat16)) == 2


def test_lambda_equalizes_the_spread_of_both_terms():
    weight = dse_lambda(RELEVANCE, DIMENSIONALITY)
    assert np.std(weight * np.array(DIMENSIONALITY)) == pytest.approx(np.std(RELEVANCE))


def test_lambda_of_constant_relevance_is_zero():
    assert dse_lambda([0.1, 0.1, 0.1], DIMENSIONALITY[:3]) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_lambda_neither_overflows_nor_vanishes(scale):
    small_or_large = [scale * v for v in DIMENSIONALITY]
    expected = dse_lambda(RELEVANCE, DIMENSIONALITY) / scale
    assert dse_lambda(RELEVANCE, small_or_large) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("relevance", "dimensionality", "message"),
    [
        ([0.1], [0.2], "class_relevance must have values of at least 2 checkpoints, got 1"),
        ([], [], "class_relevance must have values of at least 2 checkpoints, got 0"),
        ([0.1, 0.2], [0.2, 0.3, 0.4], "got 2 and 3 values"),
        ([0.1, math.nan], [0.2, 0.3], "class_relevance must be finite, got nan at checkpoint 1"),
        ([0.1, 0.2], [math.inf, 0.3], "m_dim must be finite, got inf at checkpoint 0"),
        ([0.1, 0.2], [0.3, 0.3], r"m_dim must vary .* got the same value 0.3 at all 2"),
        ([0.1, 0.2, 0.5], [0.1 + 0.2, 0.3, 0.3], "m_dim must vary"),  # differs by rounding
        ([0.1, 0.2], [0.0, 0.0], "m_dim must vary"),
        (np.zeros((2, 2)), [0.2, 0.3], r"class_relevance must be one-dimensional, .* \(2, 2\)"),
        ([0.1, 0.2], torch.tensor(0.3), r"m_dim must be one-dimensional, .* \(\)"),
        ([0.1, [0.2, 0.3]], [0.2, 0.3], "class_relevance must hold one number per checkpoint"),
    ],
)
def test_lambda_refuses(relevance, dimensionality, message):
    with pytest.raises(ValueError, match=message):
        dse_lambda(relevance, dimensionality)


@pytest.mark.parametrize("bad", ["0.1,0.2", ["a", "b"], {0.1, 0.2}, 0.5, [True, False], None])
def test_values_must_be_real_numbers(bad):
    with pytest.raises(TypeError, match="class_relevance must"):
        dse_lambda(bad, [0.2, 0.3])
    with pytest.raises(TypeError, match="scores must"):
        select_checkpoints(bad)


@pytest.mark.parametrize("container", CONTAINERS)
def test_local_maxima_are_chosen_best_first(container):
    #         0    1    2    3    4    5    6    7    8    9
    scores = [0.1, 0.4, 0.3, 0.2, 0.0, 0.5, 0.1, 0.2, 0.3, 0.9]
    chosen = select_checkpoints(CONTAINERS[container](scores))
    assert chosen == [9, 5, 1]
    assert all(type(i) is int for i in chosen)


def test_the_second_best_checkpoint_is_not_chosen_beside_the_best():
    assert select_checkpoints([0.0, 0.8, 0.9, 0.7, 0.1]) == [2]


def test_window_reaches_exactly_as_far_as_said():
    scores = [0.5, 0.1, 0.9, 0.1, 0.5]
    assert select_checkpoints(scores, window=1) == [2, 0, 4]
    assert select_checkpoints(scores, window=2) == [2]
    assert select_checkpoints([0.9, 0.1, 0.1, 0.5], window=2) == [0, 3]


def test_windows_are_truncated_at_the_ends():
    assert select_checkpoints([0.3, 0.2, 0.1, 0.2, 0.4]) == [4, 0]


def test_window_zero_ranks_all_checkpoints():
    assert select_checkpoints([0.2, 0.9, 0.5], top=5, window=0) == [1, 2, 0]


def test_at_most_top_are_chosen():
    scores = [1, 0, 0, 2, 0, 0, 3, 0, 0, 4]
    assert select_checkpoints(scores) == [9, 6, 3]
    assert select_checkpoints(scores, top=1) == [9]
    assert select_checkpoints(scores, top=100) == [9, 6, 3, 0]


def test_ties_go_to_the_earlier_checkpoint():
    assert select_checkpoints([0.5, 0.1, 0.1, 0.5, 0.1, 0.1, 0.5], top=2) == [0, 3]
    assert select_checkpoints([0.1, 0.5, 0.5, 0.1]) == [1]
    assert select_checkpoints([0.5] * 7) == [0]  # one candidate per plateau


def test_scores_that_are_not_finite_are_neither_chosen_nor_in_the_way():
    scores = [0.1, 0.4, math.nan, 0.3, 0.0, math.inf, 0.2, -math.inf]
    assert select_checkpoints(scores) == [1, 6]
    assert select_checkpoints([math.nan, -5.0, math.nan]) == [1]
    assert select_checkpoints([-1e308, -math.inf]) == [0]


def test_a_single_checkpoint_is_chosen():
    assert select_checkpoints([-0.3]) == [0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "scores must have at least one checkpoint"),
        (([math.nan, math.inf],), ValueError, "at least one finite value, got none in 2"),
        ((np.zeros((1, 3)),), ValueError, r"scores must be one-dimensional, .* \(1, 3\)"),
        (([0.1], 0), ValueError, "top must be >= 1, got 0"),
        (([0.1], 3, -1), ValueError, "window must be >= 0, got -1"),
        (([0.1], 2.5), TypeError, r"top must be an integer, got 2\.5"),
        (([0.1], 3, "2"), TypeError, "window must be an integer, got '2'"),
    ],
)
def test_selection_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        select_checkpoints(*arguments)


SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 2.0, math.nan]), st.floats(-10, 10)), max_size=30
)


@given(scores=SCORES, top=st.integers(1, 5), window=st.integers(0, 4))
def test_selection_follows_its_definition(scores, top, window):
    if not any(math.isfinite(s) for s in scores):
        with pytest.raises(ValueError, match="scores must have"):
            select_checkpoints(scores, top, window)
        return
    candidates = []
    for i, score in enumerate(scores):
        before = [s for s in scores[max(i - window, 0) : i] if not math.isnan(s)]
        after = [s for s in scores[i + 1 : i + 1 + window] if not math.isnan(s)]
        if all(score > s for s in before) and all(score >= s for s in after):
            candidates.append(i)
    candidates = [i for i in candidates if not math.isnan(scores[i])]
    candidates.sort(key=lambda i: (-scores[i], i))
    assert select_checkpoints(scores, top, window) == candidates[:top]
    assert scores[select_checkpoints(scores, top, window)[0]] == np.nanmax(scores)


@given(scores=st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_selection_is_the_same_after_a_rising_map(scores):
    assert select_checkpoints(scores) == select_checkpoints([math.exp(s) for s in scores])
