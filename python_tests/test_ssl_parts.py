"""Parts of the loop: configuration, backbones, DINO, the objective, storage, scoring data."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from ssl_run import tiny

import dse_ext
from dse_ext.ssl import PRESETS, ConfigError, TrainConfig
from dse_ext.ssl.backbone import create_backbone
from dse_ext.ssl.config import merge_options
from dse_ext.ssl.device import choose_device
from dse_ext.ssl.methods import DINO, find_method
from dse_ext.ssl.methods.base import MethodOutput
from dse_ext.ssl.objective import backward
from dse_ext.ssl.scoring import to_input
from dse_ext.ssl.storage import append_line, read_lines, replacing, save_text

# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": 0.0}, r"lr must be > 0, got 0\.0"),
        ({"lr": float("nan")}, "lr must be > 0, got nan"),
        ({"dse_weight": -1.0}, r"dse_weight must be >= 0, got -1\.0"),
        ({"dse_weight": float("nan")}, "dse_weight must be >= 0, got nan"),
        ({"warmup": 1.0}, r"warmup is a share .* got 1\.0"),
        ({"precision": "fp8"}, "precision must be float32, bfloat16 or float16, got 'fp8'"),
        ({"checkpoints": 7}, r"checkpoints must be <= steps \(6\), got 7"),
        ({"image_size": 36}, r"multiple of patch_size \(8\), got 36"),
    ],
)
def test_bad_option_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_configuration_survives_json(tmp_path):
    config = tiny(seed=5)
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text('{"stepz": 3}')
    with pytest.raises(ConfigError, match=r"unknown option\(s\) stepz"):
        TrainConfig.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        TrainConfig.load(tmp_path / "config.json")


def test_checkpoint_steps_are_even_and_end_with_the_run():
    assert tiny(steps=10, checkpoints=4).checkpoint_steps() == (0, 2, 5, 8, 10)
    assert tiny(steps=3, checkpoints=3).checkpoint_steps() == (0, 1, 2, 3)
    assert tiny(steps=12, checkpoints=0).checkpoint_steps() == (0, 12)
    assert tiny(steps=60, checkpoints=0).checkpoint_steps() == (0, 20, 40, 60)
    assert len(tiny(steps=5000, checkpoints=0).checkpoint_steps()) == 11


def test_given_options_take_precedence_over_preset_and_run(tmp_path):
    demo = merge_options({}, "demo")
    assert demo == TrainConfig(**PRESETS["demo"])
    changed = merge_options({"steps": 20, "method_args": {"momentum": 0.5}}, "demo")
    assert changed.steps == 20
    assert changed.method_args == {**demo.method_args, "momentum": 0.5}
    # Another backbone does not inherit what was meant for the preset's.
    assert merge_options({"backbone": "test_resnet"}, "demo").backbone_args == {}
    tiny(seed=9).save(tmp_path / "config.json")
    assert merge_options({}, None, tmp_path) == tiny(seed=9)
    assert merge_options({"workers": 2}, None, tmp_path) == tiny(seed=9, workers=2)
    assert merge_options({}, None, tmp_path / "new") == TrainConfig()
    with pytest.raises(ConfigError, match="preset must be one of demo, got 'fast'"):
        merge_options({}, "fast")


def test_device_is_checked(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("dse_ext.ssl.device._has_kernels", lambda key: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA kernels"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match=r"cuda:3 was asked for, but torch sees 1 GPU"):
        choose_device("cuda:3")


# ---------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ("name", "size", "patch", "positions"),
    [
        ("test_vit", 32, 8, 16),
        ("test_resnet", 64, None, 4),
        ("test_convnext", 64, None, 4),
    ],
)
def test_dense_features_are_the_last_map_without_prefix_tokens(name, size, patch, positions):
    backbone = create_backbone(name, size, patch).eval()
    images = torch.randn(2, 3, size, size)
    pooled, dense = backbone(images)
    assert pooled.shape == (2, backbone.dim)
    assert dense.shape == (2, positions, backbone.dim)
    features = backbone.model.forward_features(images)
    if features.ndim == 3:
        assert torch.equal(dense, features[:, 1:])
        assert torch.equal(pooled, features[:, 0])
    else:
        assert torch.equal(dense[:, 1], features[:, :, 0, 1])


def test_channels_last_feature_maps():
    backbone = create_backbone("swin_tiny_patch4_window7_224", 64, args={"depths": (1, 1, 1, 1)})
    _, dense = backbone.eval()(torch.randn(1, 3, 64, 64))
    assert dense.shape == (1, 4, backbone.dim)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_tinny", 32), "timm has no model 'vit_tinny'; it has "),
        (("test_resnet", 32, 8), "test_resnet does not accept patch_size"),
        (("test_vit", 32, 8, {"depht": 3}), "test_vit does not accept depht, patch_size"),
        (("test_vit", 36, 8), "cannot take 36 x 36 images"),
    ],
)
def test_bad_backbone_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(*arguments)


# ---------------------------------------------------------------- DINO


def dino(**args):
    torch.manual_seed(0)
    config = tiny()
    backbone = create_backbone("test_vit", 32, 8)
    return DINO.create(backbone, 32, 10, {**config.method_args, **args})


def test_dino_views_have_the_configured_sizes():
    transform = dino(local_views=3).transform()
    views = transform(Image.new("RGB", (40, 50)))
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    views = dino(local_views=1, local_size=24).transform()(Image.new("RGB", (40, 50)))
    assert tuple(views[2].shape) == (3, 24, 24)


def test_dino_teacher_starts_as_the_student_and_follows_it():
    method = dino(momentum=0.9)
    for s, t in ((method.student, method.teacher), (method.student_head, method.teacher_head)):
        for (name, a), b in zip(s.named_parameters(), t.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert not b.requires_grad
    with torch.no_grad():
        method.student.model.norm.bias.add_(1.0)
    method.after_optimizer(0)
    assert torch.allclose(method.teacher.model.norm.bias, torch.full((64,), 0.1))
    method.after_optimizer(10)  # the momentum has risen to 1
    assert torch.allclose(method.teacher.model.norm.bias, torch.full((64,), 0.1))
    assert method.scored() is method.teacher


def test_dino_gradient_reaches_the_student_alone():
    method = dino()
    views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    output = method(views, 0)
    assert output.patch_tokens.shape == (8, 16, 64)
    output.loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    missing = [n for n, p in method.student.named_parameters() if p.grad is None]
    assert not missing
    head = method.student_head.last_layer
    assert head.weight_v.grad is not None
    method.student_head.freeze_last_layer = 2
    method.before_optimizer(1)
    assert head.weight_v.grad is None


def test_dino_patch_tokens_are_the_students():
    method = dino().eval()
    views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)]
    tokens = method(views, 0).patch_tokens
    assert torch.equal(tokens, method.student(torch.cat(views))[1])


def test_dino_teacher_temperature_moves_linearly():
    method = dino(warmup_teacher_temp=0.02, teacher_temp=0.06, warmup_teacher_steps=0.4)
    assert [method._teacher_temp(step) for step in (0, 2, 4, 9)] == pytest.approx(
        [0.02, 0.04, 0.06, 0.06]
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"momentun": 0.9}, "method dino has no option 'momentun'; it has .*momentum"),
        ({"output_dim": 0}, "output_dim must be >= 1, got 0"),
        ({"output_dim": 1.5}, r"output_dim must be an integer, got 1\.5"),
        ({"output_dim": "big"}, "output_dim must be an integer, got 'big'"),
        ({"momentum": "high"}, "momentum must be a number, got 'high'"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\], got 1\.5"),
        ({"teacher_temp": 0.0}, r"teacher_temp must be > 0, got 0\.0"),
        ({"local_views": -1}, "local_views must be >= 0, got -1"),
        ({"local_scale": 0.9}, r"local_scale <= global_scale <= 1, got 0\.9 and 0\.4"),
    ],
)
def test_bad_method_option_is_named(args, message):
    with pytest.raises(ConfigError, match=message):
        dino(**args)


def test_unknown_method_is_named():
    with pytest.raises(ConfigError, match=r"method must be one of .*dino.*, got 'dyno'"):
        find_method("dyno")


# ---------------------------------------------------------------- objective


def test_gradient_is_that_of_the_sum():
    torch.manual_seed(1)
    weight = torch.randn(6, 6, requires_grad=True)
    inputs = torch.randn(8, 16, 6)

    def forward():
        tokens = inputs @ weight
        return MethodOutput(tokens.square().mean(), tokens)

    def regularizer():
        return dse_ext.DSERegularizer(
            weight=0.3, generator=torch.Generator().manual_seed(0), global_clusters=6
        )

    output = forward()
    values = backward(output, regularizer())
    split = weight.grad.clone()
    weight.grad = None
    output = forward()
    penalty = regularizer()(output.patch_tokens)
    (output.loss + penalty).backward()
    assert torch.allclose(split, weight.grad, rtol=1e-5, atol=1e-7)
    assert values.dse_loss == pytest.approx(penalty.item(), rel=1e-6)
    assert values.loss == pytest.approx((output.loss + penalty).item(), rel=1e-6)
    assert values.dse_loss == pytest.approx(-0.3 * values.components["dse"], rel=1e-5)
    assert values.seconds > 0


def test_without_regularizer_the_loss_stays():
    weight = torch.randn(3, requires_grad=True)
    values = backward(MethodOutput(weight.sum(), weight.view(1, 1, 3)), None)
    assert torch.equal(weight.grad, torch.ones(3))
    assert values.components == {}
    assert values.seconds == 0


# ---------------------------------------------------------------- storage


def test_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    save_text(path, "old")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fail_half_way()
    assert path.read_text() == "old"
    save_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_log_without_its_torn_last_line(tmp_path):
    path = tmp_path / "log"
    assert read_lines(path) == []
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


# ---------------------------------------------------------------- images for scores


def test_image_is_scaled_and_cut_in_the_middle():
    image = Image.new("RGB", (100, 50), (0, 0, 0))
    image.paste((255, 255, 255), (25, 0, 75, 50))
    pixels = to_input(image, 32)
    assert pixels.shape == (3, 32, 32)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(pixels.mean(dim=(1, 2)), expected, atol=0.1)
    assert to_input(Image.new("RGB", (33, 500)), 32).shape == (3, 32, 32)
    assert to_input(Image.new("RGB", (7, 5)), 32).shape == (3, 32, 32)
