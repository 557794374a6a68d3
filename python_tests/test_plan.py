"""The plan of a call on a GPU: it is what the operators' host code does, told without a GPU."""

from __future__ import annotations

import pytest
import torch

import dse_ext
from dse_ext import ops, plan

needs_library = pytest.mark.skipif("_cuda" not in ops.LIBRARIES, reason="built without CUDA")


def names(found: dict, part: str) -> list[str]:
    return [step["name"] for step in found[part]["steps"]]


@needs_library
@pytest.mark.parametrize("variant", ["regularizer", "evaluation", "paper"])
@pytest.mark.parametrize("dtype", list(plan.DTYPES))
@pytest.mark.parametrize("shape", [(256, 196, 1024), (5, 300, 40), (3, 2, 700)])
def test_every_launch_fits_the_device(
    shape: tuple[int, int, int], dtype: str, variant: str
) -> None:
    for gpu, (_, shared) in plan.GPUS.items():
        found = plan.collect(shape, dtype, gpu=gpu, variant=variant)
        for part in ("forward", "backward"):
            steps = found[part]["steps"]
            assert steps
            for step in steps:
                assert step["shared_bytes"] <= shared, step
                assert step["threads"] <= 1024, step
                if step["threads"]:
                    x, y, z = step["grid"]
                    assert 0 < x < 2**31, step
                    assert 0 < y < 2**16, step
                    assert z == 1, step


@needs_library
@pytest.mark.parametrize("variant", ["regularizer", "evaluation", "paper"])
@pytest.mark.parametrize("shape", [(6, 30, 40), (5, 300, 40), (3, 2, 700)])
def test_what_is_kept_is_what_the_fake_kernel_says(
    shape: tuple[int, int, int], variant: str
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        z = torch.empty(shape, device="cuda")
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        outputs = torch.ops.dse_ext.dse_components(z, seed, variant)
    kept = sum(t.numel() * t.element_size() for t in outputs[8:])
    assert plan.collect(shape, "float32", gpu="h200", variant=variant)["saved_bytes"] == kept


@needs_library
def test_the_path_depends_on_the_shape() -> None:
    small, large = (plan.collect((9, n, 24), gpu="h200") for n in (256, 257))
    assert "image_kernel" in names(small, "forward")
    assert "image_kernel" not in names(large, "forward")
    assert "fused image kernel" in small["paths"]["local clusters"]
    assert "any size" in large["paths"]["local clusters"]
    inverses = plan.collect((64, 196, 384), gpu="h200")
    assert "rank_update" in names(inverses, "forward")
    assert "shifted inverses" in inverses["paths"]["effective rank"]
    exact = plan.collect((64, 196, 384), "float64", gpu="h200")
    assert "library: eigendecomposition" in names(exact, "forward")
    assert "eigh" in exact["paths"]["effective rank"]
    assert "small_rank_kernel" in names(plan.collect((64, 196, 100), gpu="h200"), "forward")


@needs_library
def test_options_change_the_plan() -> None:
    one = plan.collect((64, 196, 384), gpu="h200", max_kmeans_iters=1)
    ten = plan.collect((64, 196, 384), gpu="h200", max_kmeans_iters=10)
    assert names(ten, "forward").count("kmeans_update_kernel") == 10
    assert names(one, "forward").count("kmeans_update_kernel") == 1
    few = plan.collect((64, 196, 384), gpu="h200", global_clusters=5)
    assert names(few, "forward").count("kmeans_seed_kernel") == 5
    bare = plan.collect((64, 196, 384), gpu="h200", backward=False)
    assert bare["saved_bytes"] == 0
    assert "backward" not in bare


@needs_library
def test_steep_spectra_have_their_launches_where_they_matter() -> None:
    def steep(dtype: str, backward: bool) -> set[str]:
        found = plan.collect((64, 196, 384), dtype, gpu="h200", backward=backward)
        return {name for name in names(found, "forward") if name.startswith("steep_")}

    values = {
        f"steep_{what}_kernel"
        for what in ("clusters", "rank_eigen", "rank_partials", "rank_settle")
    }
    assert steep("float32", backward=False) == set()
    assert steep("float64", backward=False) == values
    assert steep("float32", backward=True) == values | {"steep_rank_project_kernel"}
    # A matrix of few rows has no second moment.
    few = names(plan.collect((3, 2, 700), gpu="h200"), "forward")
    assert "steep_clusters_kernel" in few
    assert "steep_rank_eigen_kernel" not in few


@needs_library
def test_working_memory_is_bounded_by_the_features() -> None:
    # bfloat16 features of 98 MiB: neither pass takes three times as much beside what is kept.
    found = plan.collect((256, 196, 1024), "bfloat16", gpu="h200")
    size = 256 * 196 * 1024 * 2
    assert 0 < found["forward"]["workspace_bytes"] < 3 * size
    assert 0 < found["backward"]["workspace_bytes"] < 3 * size


@needs_library
def test_planning_runs_nothing_and_leaves_the_operators_as_they_were() -> None:
    z = torch.randn(4, 9, 8)
    plan.collect((64, 196, 384), gpu="a100")
    assert dse_ext.dse_components(z).m_dim.isfinite()
    with pytest.raises(ValueError, match="variant"):
        plan.collect((64, 196, 384), variant="other")
    # A refusal ends the recording too.
    assert dse_ext.dse_components(z).m_dim.isfinite()
    assert plan.collect((64, 196, 384))["forward"]["steps"]


@needs_library
def test_render_names_the_gpu_the_path_and_every_kernel() -> None:
    found = plan.collect((256, 196, 1024), gpu="b200")
    text = plan.render(found)
    assert "on b200" in text
    assert "z takes 98 MiB" in text
    for part in ("forward", "backward"):
        assert f"{part}: {len(found[part]['steps'])} launches" in text
        assert all(name in text for name in names(found, part))


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float64"),
        ({"gpu": "rtx"}, "gpu must be one of a100"),
        ({"shape": (0, 4, 4)}, "z must have no empty axis"),
        ({"local_clusters": 0}, "local_clusters must be >= 1"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.collect(**{"shape": (4, 9, 8), **change})


def test_without_the_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LIBRARIES", {"_ops": ops.LIBRARIES["_ops"]})
    with pytest.raises(RuntimeError, match=r"the plan needs the CUDA library, but "):
        plan.collect((4, 9, 8))
