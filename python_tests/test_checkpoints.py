"""Official checkpoint layouts: written with known weights, read, and the same features come out."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from checkpoint_files import FILES, VIT, Written, dino, mlp, swav
from safetensors.torch import save_file
from ssl_run import tiny

from dse_ext import checkpoints
from dse_ext.checkpoints import (
    PAPER,
    CheckpointError,
    CheckpointLayoutError,
    CheckpointMismatchError,
    CheckpointReader,
    UnsafeCheckpointError,
    find_checkpoints,
    find_reader,
    load,
    readers,
    register,
)
from dse_ext.checkpoints.conversions import guess_model
from dse_ext.checkpoints.load import create_model
from dse_ext.ssl import Trainer
from dse_ext.ssl.run import open_source
from dse_ext.ssl.storage import RunFolder


def saved(folder, written: Written):
    path = folder / written.name
    torch.save(written.content, path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FILES)
def test_round_trip(tmp_path, images, name):
    method, write = FILES[name]
    written = write()
    path = saved(tmp_path, written)
    (found,) = find_checkpoints(str(tmp_path / "*"), method)
    assert found.path == path
    digits = re.findall(r"\d+", written.name.partition("-step")[0].removeprefix("resnet50"))
    has_epoch = name not in ("dinov2", "dinov2, registers", "dinov3", "lightly, ViT")
    assert found.epoch == (int(digits[-1]) if has_epoch else None)

    size = written.image_size
    network = load(
        path, method, model=written.model, model_args=written.model_args, image_size=size
    )
    batch = images[:, :, :size, :size]
    with torch.no_grad():
        expected = written.dense(batch)
    pooled, dense = network(batch)
    assert dense.shape == expected.shape
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
    rows, columns = network.grid(size, size)
    assert dense.shape[1] == rows * columns
    assert pooled.shape == (2, network.dim) == (2, expected.shape[2])
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_sixteen_methods():
    assert {reader.name for reader in PAPER} == {
        method for name, (method, _) in FILES.items() if name == method
    } - {"dinov2", "dinov3"}
    assert len(PAPER) == 16


@pytest.mark.parametrize(
    ("model", "args", "tokens"),
    sorted({(r.model, tuple(k for k in r.model_args), r.prefix_tokens) for r in PAPER}),
)
def test_default_models_are_timm_models(model, args, tokens):
    reader = next(r for r in PAPER if r.model == model and tuple(r.model_args) == args)
    network = create_model(model, 224, reader.model_args)
    assert getattr(network, "num_prefix_tokens", 0) == tokens


@pytest.mark.parametrize(
    "model",
    [
        "vit_base_patch16_224",
        "vit_small_patch8_224",
        "swin_small_patch4_window7_224",
        "resnet18",
        "resnet101",
    ],
)
def test_common_networks_are_known_by_their_weights(model):
    with torch.device("meta"):
        assert guess_model(create_model(model, 224, {}).state_dict()) == model


def test_position_embeddings_follow_the_image_size(tmp_path, images):
    written = dino()
    path = saved(tmp_path, written)
    network = load(path, "dino", model_args=VIT, image_size=96)
    _, dense = network(images[:, :, :96, :96])
    assert dense.shape == (2, 36, 48)
    assert network.grid(96, 96) == (6, 6)
    assert network.grid(96, 128) == (6, 8)
    assert network.transform(to_pil(200, 120)).shape == (3, 96, 96)


def to_pil(width, height):
    from PIL import Image

    return Image.new("RGB", (width, height), (124, 116, 104))


def test_layers(tmp_path, images):
    path = saved(tmp_path, dino())
    batch = images[:, :, :64, :64]
    last = load(path, "dino", model_args=VIT, image_size=64)
    first = load(path, "dino", model_args=VIT, image_size=64, layer=0)
    by_name = load(path, "dino", model_args=VIT, image_size=64, layer="blocks.1")
    pooled, dense = first(batch)
    torch.testing.assert_close(pooled, dense.mean(dim=1))
    # The last block's output becomes the last layer's by the final norm.
    torch.testing.assert_close(last.model.norm(by_name(batch)[1]), last(batch)[1])
    assert not torch.allclose(dense, by_name(batch)[1])
    with pytest.raises(ValueError, match=r"no dense features of .*layer 'head_drop' has not run"):
        load(path, "dino", model_args=VIT, image_size=64, layer="head_drop")
    with pytest.raises(ValueError, match=r"layer must be in \[-2, 1\]"):
        load(path, "dino", model_args=VIT, image_size=64, layer=7)


def test_another_size_of_the_method(tmp_path):
    network = create_model("vit_tiny_patch16_224", 64, {"depth": 1})
    state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "checkpoint0000.pth")
    path = tmp_path / "checkpoint0000.pth"
    loaded = load(
        path, "dino", model="vit_tiny_patch16_224", model_args={"depth": 1}, image_size=64
    )
    assert loaded.dim == 192
    with pytest.raises(CheckpointMismatchError, match="look like those of vit_tiny_patch16_224"):
        load(path, "dino", image_size=64)
    with pytest.raises(CheckpointMismatchError, match=r"patches are of \(16, 16\) pixels"):
        load(path, "dino", model="vit_small_patch8_224", image_size=64)


def test_mismatch_names_the_weights(tmp_path):
    written = dino()
    del written.content["teacher"]["backbone.blocks.1.mlp.fc1.weight"]
    written.content["teacher"]["backbone.blocks.1.gate"] = torch.ones(1)
    path = saved(tmp_path, written)
    with pytest.raises(CheckpointMismatchError) as caught:
        load(path, "dino", model_args=VIT, image_size=64)
    assert caught.value.missing == ("blocks.1.mlp.fc1.weight",)
    assert caught.value.unexpected == ("blocks.1.gate",)
    assert "1 missing: blocks.1.mlp.fc1.weight; 1 unexpected: blocks.1.gate" in str(caught.value)


def test_a_convolutional_network_does_not_fit_a_transformer(tmp_path):
    path = saved(tmp_path, swav())
    with pytest.raises(CheckpointMismatchError) as caught:
        load(path, "swav", model="vit_tiny_patch16_224", image_size=64)
    assert "patch_embed.proj.weight" in caught.value.missing
    assert "conv1.weight" in caught.value.unexpected


def test_layout_errors_say_what_is_there(tmp_path):
    path = saved(tmp_path, dino())
    with pytest.raises(CheckpointLayoutError, match="are in 'model'; the file has 'args', 'dino_"):
        load(path, "mae")
    torch.save({"state_dict": mlp("queue", "net.0.weight")}, tmp_path / "epoch_1.pth")
    with pytest.raises(
        CheckpointLayoutError, match=r"begins with module\.backbone\. or backbone\."
    ):
        load(tmp_path / "epoch_1.pth", "densecl")
    torch.save([1, 2], tmp_path / "epoch_2.pth")
    with pytest.raises(CheckpointLayoutError, match="must hold a dictionary, got list"):
        load(tmp_path / "epoch_2.pth", "densecl")
    with pytest.raises(ValueError, match="timm has no 'vit_smal'"):
        load(path, "dino", model="vit_smal")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "checkpoint0001.pth", "dino")


class Payload:
    """A pickle of this runs code when it is read."""

    ran = False

    def __reduce__(self):
        return (_run, ())


def _run():
    Payload.ran = True
    return {}


def test_code_in_a_file_does_not_run_unless_allowed(tmp_path):
    written = dino()
    written.content["hyper_parameters"] = Payload()
    path = saved(tmp_path, written)
    Payload.ran = False
    with pytest.raises(UnsafeCheckpointError) as caught:
        load(path, "dino", model_args=VIT, image_size=64)
    assert not Payload.ran
    assert "needs test_checkpoints._run" in str(caught.value)
    assert "--allow-pickle" in str(caught.value)
    load(path, "dino", model_args=VIT, image_size=64, allow_pickle=True)
    assert Payload.ran


def test_files_of_old_versions_of_torch(tmp_path):
    written = dino()
    path = tmp_path / written.name
    torch.save(written.content, path, _use_new_zipfile_serialization=False)
    assert load(path, "dino", model_args=VIT, image_size=64).dim == 48
    written.content["x"] = Payload()
    torch.save(written.content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeCheckpointError, match=r"test_checkpoints\._run"):
        load(path, "dino", model_args=VIT, image_size=64)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut off"])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "checkpoint0001.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load(path, "dino")
    good = saved(tmp_path, dino())
    good.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load(good, "dino")


def test_safetensors(tmp_path):
    state = {key: value.contiguous() for key, value in swav().content["state_dict"].items()}
    save_file(state, tmp_path / "weights.safetensors")
    content = checkpoints.read_content(tmp_path / "weights.safetensors")
    assert content.keys() == state.keys()


def test_checkpoints_of_dse_ext_train(tmp_path, images):
    out = tmp_path / "run"
    config = tiny(steps=2, checkpoints=2)
    out.mkdir()
    config.save(out / "config.json")
    Trainer(config, RunFolder(out), open_source(config), torch.device("cpu")).run()
    files = find_checkpoints(out / "checkpoints", "dse-ext")
    assert [file.epoch for file in files] == [0, 1, 2]
    assert {file.run for file in files} == {"run"}
    network = load(files[-1].path, "dse-ext")
    assert network.image_size == 32
    kept = torch.load(files[-1].path, weights_only=True)["state_dict"]
    assert torch.equal(network.model.state_dict()["blocks.0.attn.qkv.weight"], kept[
        "blocks.0.attn.qkv.weight"
    ])  # fmt: skip
    assert network(images[:, :, :32, :32])[1].shape == (2, 16, 32)


def test_find_checkpoints(tmp_path):
    for run in ("b", "a"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        for name in ("checkpoint0100.pth", "checkpoint0020.pth", "checkpoint.pth", "log.txt"):
            (tmp_path / run / "checkpoints" / name).touch()
    found = find_checkpoints(f"{tmp_path}/*/checkpoints/*", "dino")
    assert [(file.run, file.epoch) for file in found] == [
        ("a", 20), ("a", 100), ("b", 20), ("b", 100),
    ]  # fmt: skip
    assert [file.epoch for file in find_checkpoints(tmp_path / "a" / "checkpoints", "dino")] == [
        20,
        100,
    ]
    with pytest.raises(FileNotFoundError, match=r"files like ckp-\{epoch\}.pth.*4 other file"):
        find_checkpoints(tmp_path / "a" / "checkpoints", "swav")
    with pytest.raises(FileNotFoundError, match="it names none"):
        find_checkpoints(tmp_path / "c" / "*.pth", "swav")
    with pytest.raises(ValueError, match=r"method must be one of .*Did you mean dino"):
        find_checkpoints(tmp_path, "dyno")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("x/run", "y/run", "y/other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "checkpoint0001.pth").touch()
    found = find_checkpoints(f"{tmp_path}/**/*.pth", "dino")
    assert [file.run for file in found] == ["x/run", "y/other", "y/run"]


def test_a_reader_of_ones_own(tmp_path, monkeypatch):
    mine = CheckpointReader(
        name="mine",
        title="Mine",
        source="https://example.org",
        network="average",
        files=("net-{epoch}.bin",),
        keys=("ema.weights",),
        prefixes=("encoder.",),
        model="vit_small_patch16_224",
    )
    model = create_model("vit_small_patch16_224", 64, {"depth": 1})
    state = {f"encoder.{key}": value for key, value in model.state_dict().items()}
    torch.save({"ema": {"weights": state, "decay": 0.99}}, tmp_path / "net-7.bin")
    path = tmp_path / "net-7.bin"
    assert load(path, mine, model_args={"depth": 1}, image_size=64).dim == 384
    with pytest.raises(CheckpointLayoutError, match=r"like net-\{epoch\}.bin"):
        mine.epoch("net.bin")

    register(mine)
    try:
        assert find_reader("mine") is mine
        assert mine in readers()
        with pytest.raises(ValueError, match="a reader named 'mine' already"):
            register(mine)
    finally:
        checkpoints.registry._READERS.pop("mine")

    (tmp_path / "my_layout.py").write_text(
        "from dataclasses import replace\n"
        "from dse_ext.checkpoints import find_reader\n"
        "def layout():\n"
        "    return replace(find_reader('dino'), name='mine', keys=('ema.weights',),\n"
        "                   files=('net-{epoch}.bin',), prefixes=('encoder.',))\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert find_checkpoints("*.bin", "my_layout:layout")[0].epoch == 7
    assert load(path, "my_layout:layout", model_args={"depth": 1}, image_size=64).dim == 384
    assert sys.path == before
    with pytest.raises(ValueError, match="cannot be imported"):
        find_reader("my_layout:nothing")
    with pytest.raises(ValueError, match=r"must be a dse_ext\.checkpoints\.CheckpointReader"):
        find_reader("my_layout:number")
