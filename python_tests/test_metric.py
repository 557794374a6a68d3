"""DSEMetric: averages over batches, follows torchmetrics' rules, reduces over ranks."""

from __future__ import annotations

import pickle
import subprocess
import sys

import features
import pytest
import torch

import dse_ext
from dse_ext import DSEMetric, dse_components

torchmetrics = pytest.importorskip("torchmetrics")

VARIANTS = ("regularizer", "evaluation", "paper")
COMPONENTS = ("m_inter", "m_intra_image", "m_intra_batch", "m_dim", "avg_norm")
KEYS = {*COMPONENTS, "class_relevance", "score", "images"}
# Clusters that suit small images, so that every component has terms.
SMALL = {"local_clusters": 2, "global_clusters": 6}


def batches(sizes: tuple[int, ...] = (6, 6, 4, 2), seed: int = 0) -> list[torch.Tensor]:
    return [features.clustered(b, 12, 8, seed=seed + i) for i, b in enumerate(sizes)]


def components_of(z: torch.Tensor, seed: int = 0, **options: object) -> dse_ext.DSEComponents:
    return dse_components(z, generator=torch.Generator().manual_seed(seed), **options)


def assert_equal_results(actual: dict, expected: dict, rel: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].item() == pytest.approx(expected[name].item(), rel=rel), name


def assert_is(result: dict, components: dse_ext.DSEComponents) -> None:
    for name in COMPONENTS:
        expected = getattr(components, name).item()
        assert result[name].item() == pytest.approx(expected, rel=1e-12), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 7])
def test_components_are_means_over_batches_weighted_by_images(variant, seed):
    metric = DSEMetric(variant=variant, seed=seed, **SMALL)
    for z in batches():
        metric.update(z)
    result = metric.compute()

    assert result.keys() == KEYS
    assert result["images"].item() == 18
    parts = [components_of(z, seed, variant=variant, **SMALL) for z in batches()]
    weights = torch.tensor([len(z) for z in batches()], dtype=torch.float64)
    for name in COMPONENTS:
        values = torch.stack([getattr(c, name) for c in parts]).double()
        expected = (weights * values).sum() / weights.sum()
        assert result[name].item() == pytest.approx(expected.item(), rel=1e-12), name
        assert expected != 0


@pytest.mark.parametrize("dim_weight", [1.0, 0.0, 3.5])
def test_score_is_made_of_the_components(dim_weight):
    metric = DSEMetric(dim_weight=dim_weight, **SMALL)
    for z in batches():
        metric.update(z)
    r = metric.compute()
    relevance = r["m_inter"] - (r["m_intra_image"] + r["m_intra_batch"]) / 2
    assert r["class_relevance"].item() == pytest.approx(relevance.item(), rel=1e-12)
    expected = relevance + dim_weight * r["m_dim"]
    assert r["score"].item() == pytest.approx(expected.item(), rel=1e-12)
    scores = torch.stack([components_of(z, **SMALL).score(dim_weight) for z in batches((5,))])
    one = DSEMetric(dim_weight=dim_weight, **SMALL)
    one.update(batches((5,))[0])
    assert one.compute()["score"].item() == pytest.approx(scores[0].item(), rel=1e-12)


def test_defaults_are_those_of_dse_components():
    z = features.clustered(9, 30, 8)
    metric = DSEMetric()
    metric.update(z)
    assert_is(metric.compute(), components_of(z))


@pytest.mark.parametrize(
    "options",
    [
        {"group_images": 2},
        {"normalize": False},
        {"max_kmeans_iters": 1},
        {"tol": 10.0},
        {"local_clusters": 4},
        {"global_clusters": 3},
    ],
)
def test_every_option_reaches_the_components(options):
    z = features.random(6, 40, 8)
    base = DSEMetric()
    changed = DSEMetric(**options)
    base.update(z)
    changed.update(z)
    assert_is(changed.compute(), components_of(z, **options))
    assert changed.compute()["score"] != base.compute()["score"]


def test_a_run_of_checkpoints_is_ready_for_lambda_and_selection():
    metric = DSEMetric(variant="evaluation", **SMALL)
    results = []
    for checkpoint in range(5):
        for z in batches((6, 4), seed=10 * checkpoint):
            metric.update(z)
        results.append(metric.compute())
        metric.reset()
    relevance = [r["class_relevance"] for r in results]
    dimensionality = [r["m_dim"] for r in results]
    weight = dse_ext.dse_lambda(relevance, dimensionality)
    expected = torch.stack(relevance).std() / torch.stack(dimensionality).std()
    assert weight == pytest.approx(expected.item(), rel=1e-9)
    scores = [a + weight * b for a, b in zip(relevance, dimensionality, strict=True)]
    assert dse_ext.select_checkpoints(scores, top=1) == [int(torch.stack(scores).argmax())]


@pytest.mark.parametrize("variant", ["regularizer", "evaluation"])
def test_a_batch_counts_the_same_whatever_came_before_it(variant):
    first, second = batches((6, 6))
    results = []
    for order in ((first, second), (second, first)):
        metric = DSEMetric(variant=variant, **SMALL)
        for z in order:
            metric.update(z)
        results.append(metric.compute())
    assert_equal_results(results[0], results[1])


def test_the_global_random_generator_is_left_alone():
    before = torch.get_rng_state()
    metric = DSEMetric(variant="evaluation", **SMALL)
    metric.update(batches()[0])
    metric.compute()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_takes_the_place_of_the_seed_and_moves_on():
    z = features.random(6, 40, 8)
    metric = DSEMetric(generator=torch.Generator().manual_seed(5))
    reference = torch.Generator().manual_seed(5)
    values = []
    for _ in range(2):
        metric.update(z)
        assert_is(metric.compute(), dse_components(z, generator=reference))
        values.append(metric.compute()["m_inter"].item())
        metric.reset()
    assert values[0] != values[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float64_for_every_input_dtype(dtype):
    z = batches()[0].to(dtype).requires_grad_()
    metric = DSEMetric(**SMALL)
    metric.update(z)
    for name, value in metric.compute().items():
        assert value.shape == ()
        assert value.dtype == (torch.int64 if name == "images" else torch.float64)
        assert not value.requires_grad
    assert not metric(z)["score"].requires_grad


def test_one_batch_that_is_not_finite_makes_the_result_nan():
    good, bad = batches((4, 4))
    bad[1, 2, 3] = float("nan")
    metric = DSEMetric(**SMALL)
    for z in (good, bad, good):
        metric.update(z)
    result = metric.compute()
    assert result.pop("images").item() == 12
    assert all(value.isnan() for value in result.values())
    metric.reset()
    metric.update(good)
    assert metric.compute()["score"].isfinite()


def test_compute_before_update_warns_and_is_nan():
    metric = DSEMetric()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        result = metric.compute()
    assert result.keys() == KEYS
    assert result.pop("images").item() == 0
    assert all(value.isnan() for value in result.values())


def test_reset_forgets():
    first, second = batches((6, 4))
    metric = DSEMetric(**SMALL)
    metric.update(first)
    metric.compute()
    metric.reset()
    metric.update(second)
    fresh = DSEMetric(**SMALL)
    fresh.update(second)
    assert_equal_results(metric.compute(), fresh.compute())


def test_forward_gives_the_batch_and_accumulates():
    metric, other = DSEMetric(**SMALL), DSEMetric(**SMALL)
    for z in batches():
        batch_result = metric(z)
        alone = DSEMetric(**SMALL)
        alone.update(z)
        assert_equal_results(batch_result, alone.compute())
        other.update(z)
    assert_equal_results(metric.compute(), other.compute())


def test_refused_features_add_nothing():
    metric = DSEMetric(**SMALL)
    metric.update(batches()[0])
    before = metric.compute()
    with pytest.raises(ValueError, match=r"z must have shape \(B, N, d\), got \(4, 5\)"):
        metric.update(torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"z must be a torch\.Tensor"):
        metric.update([[1.0]])
    assert_equal_results(metric.compute(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "papier"}, "variant must be one of .* got 'papier'"),
        ({"local_clusters": 0}, "local_clusters must be >= 1, got 0"),
        ({"global_clusters": 0}, "global_clusters must be >= 1, got 0"),
        ({"group_images": 0}, "group_images must be >= 1, got 0"),
        ({"max_kmeans_iters": 0}, "max_kmeans_iters must be >= 1, got 0"),
        ({"tol": 0.0}, "tol must be > 0, got 0.0"),
    ],
)
def test_arguments_are_checked_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        DSEMetric(**options)
    with pytest.raises(ValueError, match="Unexpected keyword arguments"):
        DSEMetric(varient="paper")


def test_pickling_and_cloning_keep_state_and_settings():
    metric = DSEMetric(variant="evaluation", seed=3, generator=torch.Generator().manual_seed(4))
    for z in batches((3, 2)):
        metric.update(z)
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert_equal_results(copy.compute(), metric.compute())
        z = batches((4,), seed=9)[0]
        original = pickle.loads(pickle.dumps(metric))
        copy.update(z)
        original.update(z)
        assert_equal_results(copy.compute(), original.compute())


def test_state_dict_continues_an_interrupted_evaluation():
    metric, whole = DSEMetric(**SMALL), DSEMetric(**SMALL)
    metric.persistent(True)
    first, second = batches((6, 4))
    metric.update(first)
    continued = DSEMetric(**SMALL)
    continued.load_state_dict(metric.state_dict())
    continued.update(second)
    for z in (first, second):
        whole.update(z)
    assert_equal_results(continued.compute(), whole.compute())


def test_to_moves_the_states(device):
    metric = DSEMetric(**SMALL).to(device)
    metric.update(batches()[0].to(device))
    assert all(value.device.type == device.type for value in metric.compute().values())
    moved = DSEMetric(**SMALL).to("meta")
    assert moved.m_inter.device.type == "meta"
    assert moved.images.device.type == "meta"


def test_metric_collection_keeps_variants_apart():
    options = {"compute_groups": [["evaluation"], ["paper"]]}
    collection = torchmetrics.MetricCollection(
        {v: DSEMetric(variant=v, **SMALL) for v in ("evaluation", "paper")}, **options
    )
    for z in batches():
        collection.update(z)
    result = collection.compute()
    for variant in ("evaluation", "paper"):
        alone = DSEMetric(variant=variant, **SMALL)
        for z in batches():
            alone.update(z)
        expected = alone.compute()
        for name in KEYS:
            keys = [k for k in result if k.endswith(name) and variant in k]
            assert len(keys) == 1, result.keys()
            assert result[keys[0]].item() == expected[name].item()


def test_metric_collection_with_another_metric():
    collection = torchmetrics.MetricCollection([DSEMetric(**SMALL), torchmetrics.MeanMetric()])
    z = batches()[0]
    first = collection(z)
    collection.update(z)
    result = collection.compute()
    assert set(result) >= KEYS
    assert "MeanMetric" in result
    assert first["score"] == result["score"]
    assert result["images"].item() == 2 * len(z)


def test_plot_shows_the_components():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    metric = DSEMetric(**SMALL)
    series = [metric(z) for z in batches()]
    for shown in (None, series[0], series):
        figure, axes = metric.plot(shown)
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert set(labels) == KEYS - {"images"}
        plt.close(figure)
    _, axes = plt.subplots()
    assert metric.plot(series, ax=axes)[1] is axes
    plt.close("all")


def test_importing_the_library_does_not_import_torchmetrics():
    code = (
        "import sys, dse_ext; assert 'torchmetrics' not in sys.modules; "
        "dse_ext.DSEMetric; assert 'torchmetrics' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    try:
        results = {}
        for variant in VARIANTS:
            metric = DSEMetric(variant=variant, **SMALL)
            for z in batches()[rank::world]:
                metric.update(z)
            synced = metric.compute()
            # After compute the states are the rank's own again, so that updates can go on.
            results[variant] = (synced, metric.images.item())
        metric = DSEMetric(**SMALL)
        if rank == 0:
            metric.update(batches()[0])
        results["data on rank 0 only"] = (metric.compute(), metric.images.item())
        torch.save(results, f"{out}.{rank}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes got; they are started once, since that takes seconds."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (2, str(folder / "store"), str(folder / "results"))
    torch.multiprocessing.spawn(_rank, args=arguments, nprocs=2)
    return [torch.load(folder / f"results.{rank}") for rank in range(2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_give_the_result_of_one_process_over_all_batches(variant, of_two_ranks):
    alone = DSEMetric(variant=variant, **SMALL)
    for z in batches():
        alone.update(z)
    for results, own_images in zip(of_two_ranks, (6 + 4, 6 + 2), strict=True):
        synced, images = results[variant]
        assert_equal_results(synced, alone.compute())
        assert synced["images"].item() == 18
        assert images == own_images


def test_a_rank_without_data_changes_nothing(of_two_ranks):
    alone = DSEMetric(**SMALL)
    alone.update(batches()[0])
    for results in of_two_ranks:
        assert_equal_results(results["data on rank 0 only"][0], alone.compute())
