"""DenseFeatures against what each library's own interface gives."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dse_ext
from dse_ext.hooks import DenseFeatures, block_names, dense_layers, unwrap


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options).eval()


def vit(**options: Any) -> nn.Module:
    return timm_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=3, embed_dim=24,
        num_heads=2, **options,
    )  # fmt: skip


def images(height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def flat(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


# name -> (model, what its own interface calls the dense features, grid)
TIMM: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], Any]] = {
    "vit": (vit, lambda m, x: m.forward_features(x)[:, 1:], (4, 6)),
    "vit, mean pooling": (
        lambda: vit(global_pool="avg", fc_norm=True),
        lambda m, x: m.forward_features(x)[:, 1:],
        (4, 6),
    ),
    "vit, registers, no class token": (
        lambda: vit(class_token=False, reg_tokens=4, global_pool="avg"),
        lambda m, x: m.forward_features(x)[:, 4:],
        (4, 6),
    ),
    "swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=(32, 48), window_size=4, embed_dim=12,
            depths=(1, 1), num_heads=(1, 1),
        ),
        lambda m, x: m.forward_features(x).flatten(1, 2),
        (4, 6),
    ),
    "resnet": (
        lambda: timm_model("resnet18"),
        lambda m, x: flat(m.forward_features(x)),
        (1, 2),
    ),
    "convnext": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        lambda m, x: flat(m.forward_features(x)),
        (1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    create, reference, grid = TIMM[name]
    model, x = create(), images()
    with DenseFeatures(model) as features:
        model(x)
    assert features.last is not None
    torch.testing.assert_close(features.last, reference(model, x))
    assert features.grid == grid
    assert features.last.requires_grad


def transformers_models() -> dict[str, tuple[Callable[[], nn.Module], int, bool]]:
    """name -> (model, prefix tokens, whether last_hidden_state is a map)."""
    import transformers as t

    vit_like: dict[str, Any] = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    swin = {"image_size": 32, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1],
            "window_size": 4}  # fmt: skip
    conv = {"hidden_sizes": [8, 16], "depths": [1, 1]}
    return {
        "ViTModel": (lambda: t.ViTModel(t.ViTConfig(**vit_like)), 1, False),
        "Dinov2WithRegistersModel": (
            lambda: t.Dinov2WithRegistersModel(
                t.Dinov2WithRegistersConfig(num_register_tokens=3, **vit_like)
            ),
            4,
            False,
        ),
        "IJepaModel": (lambda: t.IJepaModel(t.IJepaConfig(**vit_like)), 0, False),
        "DeiTModel": (lambda: t.DeiTModel(t.DeiTConfig(**vit_like)), 2, False),
        "SwinModel": (lambda: t.SwinModel(t.SwinConfig(**swin)), 0, False),
        "ResNetModel": (lambda: t.ResNetModel(t.ResNetConfig(embedding_size=8, **conv)), 0, True),
    }


@pytest.mark.parametrize(
    "name",
    ["ViTModel", "Dinov2WithRegistersModel", "IJepaModel", "DeiTModel", "SwinModel", "ResNetModel"],
)
def test_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    create, prefix, is_map = transformers_models()[name]
    model, x = create().eval(), images(32, 32)
    hidden = model(pixel_values=x).last_hidden_state
    expected = flat(hidden) if is_map else hidden[:, prefix:]
    for layer in (None, ""):  # the final norm; the model itself, whose output has many fields
        with DenseFeatures(model, layer) as features:
            model(pixel_values=x)
        torch.testing.assert_close(features.take(), expected)
    assert features.grid == (4, 4)


def test_transformers_behind_a_head() -> None:
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model, x = t.ViTForImageClassification(config).eval(), images(32, 32)
    with DenseFeatures(model, -2) as features:
        states = model(pixel_values=x, output_hidden_states=True).hidden_states
    assert features.layer == "vit.layers.0" or features.layer == "vit.encoder.layer.0"
    torch.testing.assert_close(features.take(), states[1][:, 1:])


def test_torchvision() -> None:
    import torchvision

    x = images(32, 32)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 32).eval()
    with DenseFeatures(model) as features:
        model(x)
    tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(x)], dim=1)
    torch.testing.assert_close(features.take(), model.encoder(tokens)[:, 1:])
    assert features.grid == (4, 4)

    model = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [1, 2], [4, 4]).eval()
    with DenseFeatures(model) as features:
        model(x)
    torch.testing.assert_close(features.take(), model.norm(model.features(x)).flatten(1, 2))

    model = torchvision.models.resnet18().eval()
    with DenseFeatures(model, "layer2") as features:
        model(x)
    maps = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    torch.testing.assert_close(features.take(), flat(model.layer2(model.layer1(maps))))
    assert features.grid == (4, 4)


def test_blocks_by_index() -> None:
    model, x = vit(), images()
    expected = model.get_intermediate_layers(x, n=3, norm=False)
    for index, block in ((0, 0), (1, 1), (-1, 2), (-3, 0)):
        with DenseFeatures(model, index) as features:
            model(x)
        torch.testing.assert_close(features.take(), expected[block])
        assert features.layer == f"blocks.{block}"


@pytest.mark.parametrize("height", [32, 64])
@pytest.mark.parametrize("last", [False, True])
def test_layout_of_maps(height: int, last: bool) -> None:
    """As many rows as channels: the layer's weights tell the two layouts apart."""

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(1, -1)

    layers: list[nn.Module] = [nn.Conv2d(3, 8, 8, stride=8)]
    if last:
        layers += [Turn(), nn.LayerNorm(8), nn.Linear(8, 16)]
    model = nn.Sequential(*layers)
    x = images(height, 64)
    with DenseFeatures(model, str(len(layers) - 1)) as features:
        out = model(x)
    torch.testing.assert_close(features.take(), out.flatten(1, 2) if last else flat(out))
    assert features.grid == (height // 8, 8)


def test_a_layout_that_is_told() -> None:
    model = nn.Sequential(nn.Identity())
    x = torch.rand(2, 5, 5, 5)
    with DenseFeatures(model, "0", channels_last=True) as features:
        model(x)
    assert torch.equal(features.take(), x.flatten(1, 2))
    with DenseFeatures(model, "0") as features:
        model(x)
    assert torch.equal(features.take(), flat(x))


def test_masked_tokens_have_no_grid() -> None:
    t = pytest.importorskip("transformers")
    config = t.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, mask_ratio=0.75,
    )  # fmt: skip
    model = t.ViTMAEModel(config)
    with DenseFeatures(model) as features:
        model(images(32, 32))
    assert features.last is not None
    assert features.last.shape == (2, 4, 24)
    assert features.grid is None


def test_sequence_first() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 8, stride=8)
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.conv(x).flatten(2).permute(2, 0, 1))

    model = Blocks()
    with DenseFeatures(model) as features:
        out = model(images())
    assert torch.equal(features.take(), out.transpose(0, 1))
    assert features.grid == (4, 6)


def test_a_student_beside_a_teacher() -> None:
    model = nn.ModuleDict({"student": vit(), "teacher": vit()})
    x = images()
    with DenseFeatures(model, "teacher.norm") as features:
        model["teacher"](x)
    assert features.grid == (4, 6)
    with DenseFeatures(model, "student.norm") as features:
        model["student"](x)
        ours = features.last
        model["teacher"](x)
    assert features.last is ours
    assert ours is not None
    assert ours.shape == (2, 24, 24)


def test_gradient_reaches_the_backbone() -> None:
    model, x = vit(), images()
    with DenseFeatures(model) as features:
        model(x)
    dse_ext.DSERegularizer()(features.take()).backward()
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.norm() > 0


def test_several_views() -> None:
    model = vit(dynamic_img_size=True)
    large, small = images(32, 48), images(16, 16)
    with DenseFeatures(model, keep=None) as features:
        model(large)
        model(small)
    assert [tuple(c.shape) for c in features.calls] == [(2, 24, 24), (2, 4, 24)]
    assert features.grid == (2, 2)
    features.clear()
    assert features.calls == ()
    with DenseFeatures(model, keep=2) as features:
        for x in (large, small, small):
            model(x)
    assert [c.shape[1] for c in features.calls] == [4, 4]


def test_taken_features_are_gone() -> None:
    model = vit()
    features = DenseFeatures(model)
    with pytest.raises(RuntimeError, match="layer 'norm' has not run"):
        features.take()
    model(images())
    assert features.take().shape == (2, 24, 24)
    assert features.last is None
    features.remove()
    model(images())
    assert features.last is None
    assert not any(module._forward_hooks for module in model.modules())


def test_copies_and_pickles_have_no_hook() -> None:
    model = vit()
    features = DenseFeatures(model)
    model(images())
    ours = features.last
    teacher = copy.deepcopy(model)
    teacher(images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.load(file, weights_only=False)(images())
    assert features.last is ours
    assert "DenseFeatures" not in file.getvalue().decode("latin-1")


def test_activation_checkpointing_does_not_replace_the_features() -> None:
    model = vit().train()
    model.set_grad_checkpointing(True)
    features = DenseFeatures(model, -1)
    out = model(images())
    captured = features.last
    assert captured is not None
    (out.sum() + dse_ext.DSERegularizer()(captured)).backward()
    assert features.last is captured


def test_compiled_models() -> None:
    model, x = vit(), images()
    expected = model.forward_features(x)[:, 1:]
    features = DenseFeatures(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for shift in (0.0, 1.0):
        compiled(x + shift)
        if shift == 0:
            torch.testing.assert_close(features.last, expected)
    gradient = torch.autograd.grad(features.take().square().sum(), model.norm.weight)[0]
    assert gradient.norm() > 0
    assert features.grid == (4, 6)
    assert DenseFeatures(compiled).layer == "norm"
    assert unwrap(compiled) is model


def test_names_of_layers() -> None:
    model = vit()
    assert block_names(model) == ["blocks.0", "blocks.1", "blocks.2"]
    assert dense_layers(model) == ["norm", "blocks.0", "blocks.1", "blocks.2"]
    assert block_names(nn.Sequential(nn.ReLU())) == []


def bad(layer: Any, model: nn.Module | None = None, **options: Any) -> None:
    DenseFeatures(vit() if model is None else model, layer, **options)


def test_errors_name_the_candidates() -> None:
    with pytest.raises(ValueError, match=r"got 'nrm'; similar: .*'norm'.*'blocks.0', 'blocks.1'"):
        bad("nrm")
    with pytest.raises(ValueError, match=r"layer must be in \[-3, 2\] for the 3 blocks .* got 3"):
        bad(3)
    with pytest.raises(ValueError, match="a name, an integer or None, got True"):
        bad(True)
    with pytest.raises(ValueError, match=r"Sequential has no list of blocks .* one of '0', '1'"):
        bad(None, nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))
    with pytest.raises(ValueError, match="prefix_tokens must be >= 0 or None, got -1"):
        bad(None, prefix_tokens=-1)
    with pytest.raises(ValueError, match="keep must be >= 1 or None, got 0"):
        bad(None, keep=0)


def test_a_layer_that_is_not_dense() -> None:
    model = vit(num_classes=10)
    with (
        DenseFeatures(model, "head"),
        pytest.raises(
            ValueError, match=r"'head' must give tokens .* got shape \(2, 10\); .*'norm'"
        ),
    ):
        model(images())
    with (
        DenseFeatures(model, prefix_tokens=25),
        pytest.raises(ValueError, match="gives 25 tokens an image, of which the first 25"),
    ):
        model(images())
