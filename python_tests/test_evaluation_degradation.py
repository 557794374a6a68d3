"""Runs built to degrade: DSE falls and finds the best checkpoint, ranks alone miss one of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from degrading_run import BEST, IMAGES, RANK_COLLAPSES, SEPARABILITY_FALLS, VIEWS, Network, Run

import dse_ext
from dse_ext.evaluation import EvaluateConfig, Scorer
from dse_ext.evaluation.images import Item

RANKS = ("rankme", "rankme_dense", "alpha_req", "lidar")


def scored(checkpoints):
    run = Run()
    scorer = Scorer(EvaluateConfig("dino", "", "", batch_size=20), torch.device("cpu"))
    numbers = torch.arange(IMAGES, dtype=torch.float32)
    views = torch.cartesian_prod(numbers, torch.arange(VIEWS, dtype=torch.float32))
    rows, truth = [], []
    for mixing, directions in checkpoints:
        features = run.features(mixing, directions)
        rows.append(
            scorer.score(
                Network(run, features),
                [Item(part, ()) for part in numbers.unsqueeze(1).split(20)],
                IMAGES,
                [Item(part, ()) for part in views.view(IMAGES, VIEWS, 2).split(10)],
            )
        )
        truth.append(run.accuracy(features))
    relevance = [row["class_relevance"] for row in rows]
    dim = [row["m_dim"] for row in rows]
    weight = dse_ext.dse_lambda(relevance, dim)
    return rows, [a + weight * b for a, b in zip(relevance, dim, strict=True)], truth


@pytest.fixture(scope="module")
def separability_falls():
    return scored(SEPARABILITY_FALLS)


@pytest.fixture(scope="module")
def rank_collapses():
    return scored(RANK_COLLAPSES)


@pytest.mark.parametrize("name", ["separability_falls", "rank_collapses"])
def test_dse_falls_with_the_quality_and_finds_the_best(name, request):
    _, dse, truth = request.getfixturevalue(name)
    # The construction does what it says: the quality is best at the best checkpoint and then falls.
    assert max(truth) == truth[BEST]
    assert truth[-1] < truth[BEST] - 0.1
    after = dse[BEST:]
    assert all(a > b for a, b in pairwise(after))
    assert dse_ext.select_checkpoints(dse)[0] == BEST


def test_separability_falls_and_ranks_do_not_see_it(separability_falls):
    rows, dse, _ = separability_falls
    best, last = rows[BEST], rows[-1]
    assert last["class_relevance"] < best["class_relevance"] - 0.2
    assert dse[-1] < dse[BEST] - 0.2
    for name in RANKS:
        assert last[name] == pytest.approx(best[name], rel=1e-5), name
        # What rounding leaves of a difference aside, every checkpoint from the best one on is as
        # good as the others to them.
        assert {round(row[name], 3) for row in rows[BEST:]} == {round(best[name], 3)}, name


def test_rank_collapses_while_separability_stays(rank_collapses):
    rows, dse, _ = rank_collapses
    best, last = rows[BEST], rows[-1]
    assert last["rankme_dense"] < best["rankme_dense"] / 2
    assert last["m_dim"] < best["m_dim"] / 2
    assert last["class_relevance"] == pytest.approx(best["class_relevance"], abs=0.06)
    assert dse[-1] < dse[BEST] - 0.2
