"""The sixteen methods: each learns, is regularized, and can be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from ssl_run import assert_same_networks, tiny_method, without_times

import dse_ext
from dse_ext.ssl import ConfigError, Interrupted, TrainConfig, Trainer
from dse_ext.ssl.backbone import FAMILIES, create_backbone
from dse_ext.ssl.loader import AugmentedViews, StepSampler, batches
from dse_ext.ssl.methods import METHODS
from dse_ext.ssl.objective import Regularized
from dse_ext.ssl.randomness import seed_all
from dse_ext.ssl.run import open_source
from dse_ext.ssl.storage import RunFolder, read_lines

EVERY = pytest.mark.parametrize("name", METHODS)


def create(config):
    torch.manual_seed(0)
    backbone = create_backbone(
        config.backbone, config.image_size, config.patch_size, config.backbone_args
    )
    method = METHODS[config.method].create(
        backbone, config.image_size, config.steps, config.method_args
    )
    return backbone, method.train()


def views_of(config, method):
    """The first batch of a run."""
    dataset = AugmentedViews(open_source(config), method.transform(), 0)
    sampler = StepSampler(config.train_images, config.batch_size, 0, 1, 0)
    return next(iter(batches(dataset, sampler))).views


def trainer(config, out):
    folder = RunFolder(out)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    return Trainer(config, folder, open_source(config), torch.device("cpu"))


# ---------------------------------------------------------------- what they say of themselves


def test_the_methods_are_those_of_the_paper():
    assert len(METHODS) == 16
    for name, method in METHODS.items():
        assert method.name == name
        assert method.title
        assert method.paper
        assert method.url.startswith("https://arxiv.org/abs/")
        assert method.regularizes
        assert set(method.families) <= set(FAMILIES)


def test_readme_says_for_each_method_what_is_regularized():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for method in METHODS.values():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{method.name}` |"))
        for text in (method.title, method.url, method.backbones(), method.regularizes):
            assert text in row, method.name


@EVERY
def test_recipe_is_a_configuration_that_runs(name):
    config = TrainConfig.for_method(name)
    assert config.method == name
    _, method = create(config)
    # The scored network is of the size that the checkpoints are loaded with.
    assert method.scored().grid(config.image_size) == 6


def test_recipe_is_for_its_kind_of_backbone():
    assert TrainConfig.for_method("byol").optimizer == "lars"
    assert TrainConfig.for_method("byol", backbone="resnet50").optimizer == "lars"
    other = TrainConfig.for_method("byol", backbone="vit_tiny_patch16_224")
    assert (other.optimizer, other.backbone_args) == ("adamw", {})
    given = TrainConfig.for_method("byol", lr=0.01, backbone_args={"output_stride": 8})
    assert (given.lr, given.backbone_args) == (0.01, {"output_stride": 8})
    assert TrainConfig.for_method("dino") == TrainConfig()


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("family", FAMILIES)
@EVERY
def test_backbones_of_each_family(name, family):
    """An accepted family trains; another one is refused by name."""
    config = tiny_method(name, family)
    if family not in METHODS[name].families:
        with pytest.raises(ConfigError, match=f"method {name} trains .* of the family"):
            create(config)
        return
    backbone, method = create(config)
    output = method(views_of(config, method), 0)
    assert output.loss.ndim == 0
    assert torch.isfinite(output.loss)
    assert output.loss.dtype == torch.float32
    assert output.patch_tokens.shape[0] == output.views * config.batch_size
    assert output.patch_tokens.shape[2] == backbone.dim
    output.loss.backward()
    optimized = [p for m in method.trained() for p in m.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in optimized)
    # Nothing else may be trained: teachers and targets follow.
    ids = {id(p) for p in optimized}
    assert all(p.grad is None for p in method.parameters() if id(p) not in ids)


@EVERY
def test_loss_falls_on_a_fixed_batch(name):
    """Targets, masks and queues held fixed, the optimizer brings the loss down."""
    config = tiny_method(name)
    _, method = create(config)
    views = views_of(config, method)
    start = {key: buffer.clone() for key, buffer in method.named_buffers()}
    parameters = [p for m in method.trained() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def loss():
        with torch.no_grad():
            for key, buffer in method.named_buffers():
                buffer.copy_(start[key])
        seed_all(1)
        return method(views, config.steps).loss

    before = loss().item()
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    after = loss().item()
    assert after < before - 0.02 * abs(before), (before, after)


@EVERY
def test_dse_gradient_reaches_the_backbone(name):
    config = tiny_method(name)
    backbone, method = create(config)
    tokens = method(views_of(config, method), 0).patch_tokens
    dse_ext.DSERegularizer(generator=torch.Generator().manual_seed(0))(tokens).backward()
    first = next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d))
    if first.weight.requires_grad:
        assert first.weight.grad.abs().max() > 0
    else:  # MoCo v3 keeps the patch embedding of a ViT fixed
        assert backbone.model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    others = [p for n, p in method.named_parameters() if "teacher" in n or "target" in n]
    assert all(p.grad is None for p in others)


# ---------------------------------------------------------------- runs


@EVERY
def test_weight_zero_is_bitwise_the_run_without_the_regularizer(name, tmp_path, monkeypatch):
    config = tiny_method(name, dse_weight=0.0, steps=2)
    trainer(config, tmp_path / "zero").run()

    def plain(output, regularizer, **kwargs):
        output.loss.backward()
        return Regularized(float(output.loss.detach()), 0.0, {}, 0.0)

    monkeypatch.setattr("dse_ext.ssl.trainer.backward", plain)
    monkeypatch.setattr("dse_ext.regularizer.DSERegularizer.forward", None)
    trainer(config, tmp_path / "plain").run()
    assert_same_networks(tmp_path / "zero", tmp_path / "plain")


@EVERY
def test_resumed_run_is_bitwise_the_run_that_was_not_interrupted(name, tmp_path):
    config = tiny_method(name, dse_weight=0.1, dim_weight="auto", dse_warmup=0.5)
    trainer(config, tmp_path / "whole").run()
    first = trainer(config, tmp_path / "parts")

    def stop(row):
        first._stop = row["step"] >= 2

    with pytest.raises(Interrupted):
        first.run(stop)
    second = trainer(config, tmp_path / "parts")
    assert second.resume()
    second.run()
    assert_same_networks(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_lines(tmp_path / p / "metrics.jsonl") for p in ("whole", "parts"))
    assert without_times(whole) == without_times(parts)
    assert all(0 < row["dse_seconds"] < row["step_seconds"] for row in whole)


# ---------------------------------------------------------------- single methods


def test_views_have_the_configured_sizes():
    image = Image.new("RGB", (40, 50))
    for name, sizes in {
        "swav": [32, 32, 16],
        "mae": [32],
        "ijepa": [32],
        "byol": [32, 32],
        "ibot": [32, 32, 16],
    }.items():
        _, method = create(tiny_method(name))
        assert [tuple(v.shape) for v in method.transform()(image)] == [(3, s, s) for s in sizes]
    _, method = create(tiny_method("vicregl"))
    views = method.transform()(image)
    assert [tuple(v.shape) for v in views] == [(3, 32, 32)] * 2 + [(4, 4, 2)] * 2


def test_masked_vit_is_needed_where_patches_are_masked():
    config = tiny_method("mae", backbone="vit_small_patch16_rope_224", backbone_args={})
    config = TrainConfig.from_dict({**config.to_dict(), "patch_size": None, "image_size": 32})
    with pytest.raises(ConfigError, match="masks patches, which needs a plain ViT"):
        create(config)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("mae", {"mask_ratio": 0.99}, "must leave some of the 16 patches visible"),
        ("mae", {"decoder_dim": 25}, "must be a multiple of decoder_heads"),
        ("ijepa", {"target_min_scale": 0.5}, "target_min_scale <= target_max_scale"),
        ("ijepa", {"predictor_dim": 95}, "must be a multiple of predictor_heads"),
        ("byol", {"momentum": 1.5}, r"momentum must lie in \[0, 1\], got 1\.5"),
        ("mocov3", {"temperature": 0.0}, r"temperature must be > 0, got 0\.0"),
        ("swav", {"prototypes": 0}, "prototypes must be >= 1, got 0"),
        ("vicreg", {"crop_scale": 0.0}, r"crop_scale must be > 0, got 0\.0"),
        ("simsiam", {"queue": 3}, "method simsiam has no option 'queue'"),
    ],
)
def test_bad_method_option_is_named(name, args, message):
    config = tiny_method(name)
    with pytest.raises(ConfigError, match=message):
        create(TrainConfig.from_dict({**config.to_dict(), "method_args": args}))


def test_batch_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"accumulate must be >= 2, got 4 / 4"):
        trainer(tiny_method("vicreg", accumulate=4), tmp_path)
