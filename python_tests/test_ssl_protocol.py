"""When and how DSE takes part, precision, memory savers, and starting from a checkpoint."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from ssl_run import TINY, assert_same_networks, networks, tiny, tiny_method, without_times

from dse_ext.hooks import DenseFeatures
from dse_ext.ssl import ConfigError, TrainConfig, Trainer, TrainingDiverged, train
from dse_ext.ssl.backbone import create_backbone
from dse_ext.ssl.config import merge_options
from dse_ext.ssl.methods.base import MethodOutput
from dse_ext.ssl.objective import backward
from dse_ext.ssl.regularization import Regularization, RunningDeviation
from dse_ext.ssl.run import open_source
from dse_ext.ssl.storage import RunFolder, read_lines


def trainer(config, out):
    folder = RunFolder(out)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    config.save(folder.config)
    return Trainer(config, folder, open_source(config), torch.device("cpu"))


def run(config, out):
    """Trains without scores and report; returns the log."""
    trainer(config, out).run()
    return read_lines(out / "metrics.jsonl")


def schedule(**changes):
    return Regularization(tiny(**changes), torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dse_every": 0}, "dse_every must be >= 1, got 0"),
        ({"dse_warmup": 1.5}, r"dse_warmup is a share .* got 1\.5"),
        ({"dim_weight": "online"}, "dim_weight must be a number >= 0 or 'auto', got 'online'"),
        ({"dim_weight": -1.0}, r"dim_weight must be a number >= 0 or 'auto', got -1\.0"),
        ({"dse_views": -1}, "dse_views must be >= 0, got -1"),
        ({"accumulate": 3}, r"accumulate must divide batch_size \(4\), got 3"),
        ({"optimizer": "adam"}, "optimizer must be adamw, sgd or lars, got 'adam'"),
        ({"sgd_momentum": 1.0}, r"sgd_momentum must lie in \[0, 1\), got 1\.0"),
        ({"epochs": -1.0}, r"epochs must be >= 0, got -1\.0"),
    ],
)
def test_bad_option_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_protocol_survives_json(tmp_path):
    config = tiny(
        dim_weight="auto",
        dse_every=3,
        dse_warmup=0.25,
        dse_layer="blocks.0",
        dse_views=1,
        init="runs/a/resume.pt",
        grad_checkpointing=True,
        precision="float16",
    )
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_epochs_become_steps():
    config = tiny(epochs=2.5, train_images=10, batch_size=4)
    assert config.for_images(10).steps == 7
    assert tiny().for_images(10).steps == TINY["steps"]
    assert tiny(epochs=0.1, checkpoints=3).for_images(10).checkpoint_steps() == (0, 1)
    with pytest.raises(ConfigError, match=r"steps or epochs, not both: got 5 and 1\.0"):
        merge_options({"steps": 5, "epochs": 1.0})


# ---------------------------------------------------------------- when and how strongly


def test_weight_rises_and_takes_part_at_every_nth_step():
    plan = schedule(steps=10, dse_warmup=0.4, dse_weight=0.2, dse_every=1)
    weights = [plan.at(step).weight for step in range(10)]
    assert weights == pytest.approx([0.05, 0.1, 0.15] + [0.2] * 7)
    plan = schedule(dse_every=3)
    assert [plan.at(step) is not None for step in range(7)] == [
        True, False, False, True, False, False, True
    ]  # fmt: skip
    assert schedule(dse_weight=0.0).at(0) is None


def test_running_deviation_is_the_standard_deviation():
    values = [0.3, -1.5, 2.25, 0.0, 7.5]
    running = RunningDeviation()
    for count, value in enumerate(values, start=1):
        running.update(value)
        expected = statistics.stdev(values[:count]) if count > 1 else 0.0
        assert running.value == pytest.approx(expected)
    copied = RunningDeviation()
    copied.load(running.state())
    assert copied.value == running.value


def test_dim_weight_follows_the_run():
    plan = schedule(dim_weight="auto")
    relevance, dims = [], []
    for step in range(20):
        expected = 1.0
        if step >= 10:
            expected = statistics.stdev(relevance) / statistics.stdev(dims)
        assert plan.at(step).dim_weight == pytest.approx(expected)
        inter, dim = math.sin(step), 0.1 * math.cos(2 * step)
        plan.observe(
            {"m_inter": inter, "m_intra_image": 0.5, "m_intra_batch": 0.1 * step, "m_dim": dim}
        )
        relevance.append(inter - (0.5 + 0.1 * step) / 2)
        dims.append(dim)
    plan.observe({"m_inter": math.nan, "m_intra_image": 0.0, "m_intra_batch": 0.0, "m_dim": 0.0})
    again = schedule(dim_weight="auto")
    again.load_state_dict(plan.state_dict())
    assert again.at(20).dim_weight == plan.at(20).dim_weight
    assert schedule(dim_weight=0.25).at(0).dim_weight == 0.25


def test_log_says_when_dse_took_part(tmp_path):
    config = tiny(dse_every=2, dse_warmup=0.5, dim_weight=0.5, dse_weight=0.3)
    rows = run(config, tmp_path)
    assert ["dse" in row for row in rows] == [True, False] * 3
    for row in rows:
        if "dse" not in row:
            assert row["dse_loss"] == 0
            assert row["dse_seconds"] == 0
            continue
        spread = (row["m_intra_image"] + row["m_intra_batch"]) / 2
        assert row["dse"] == pytest.approx(row["m_inter"] - spread + 0.5 * row["m_dim"], rel=1e-4)
        assert row["dse_loss"] == pytest.approx(-row["dse_weight"] * row["dse"], rel=1e-4)
    assert [row["dse_weight"] for row in rows[::2]] == pytest.approx([0.1, 0.3, 0.3])


def test_report_of_a_run_with_every_option(tmp_path):
    config = tiny(
        dse_every=2, dim_weight="auto", dse_warmup=0.5, dse_layer="0", dse_views=1, steps=2,
        checkpoints=1,
    )  # fmt: skip
    result = train(config, tmp_path)
    assert result.summary["training"]["skipped_steps"] == 0
    text = result.report.read_text()
    for words in ("1 of them at most", "of layer 0", "every 2nd step", "λ from the run", "50%"):
        assert words in text


# ---------------------------------------------------------------- what is regularized


def test_layer_and_views_are_those_that_were_asked_for():
    config = tiny()
    backbone = create_backbone("test_vit", 32, 8).eval()
    images = torch.randn(2, 3, 32, 32)
    last = backbone.encode(images)
    assert torch.equal(last.regularized, last.dense)
    with DenseFeatures(backbone.model, "blocks.0") as features:
        backbone.encode(images)
        expected = features.take()
    for layer in ("0", "blocks.0"):
        backbone.tap(layer)
        encoded = backbone.encode(images)
        assert torch.equal(encoded.regularized, expected)
        assert torch.equal(encoded.dense, last.dense)
    backbone.tap("last")
    assert torch.equal(backbone.encode(images).regularized, last.dense)
    with pytest.raises(ConfigError, match=r"dse_layer: layer must be the name of a module"):
        backbone.tap("blocks.99.norm")
    with pytest.raises(ConfigError, match=r"dse_layer: layer must be in \["):
        backbone.tap("99")
    assert config.dse_layer == "last"


@pytest.mark.parametrize("name", ["dino", "ibot", "mae", "byol"])
def test_gradient_enters_at_the_layer_that_was_chosen(name, tmp_path):
    """Of a run with the first block regularized DSE's gradient passes by the second one."""
    run = trainer(tiny_method(name, dse_layer="0"), tmp_path)
    views = [torch.randn(4, 3, 32, 32)] * 2
    if name == "byol":
        run = trainer(tiny_method(name, "vit", dse_layer="0"), tmp_path)
    tokens = run.method(views, 0).patch_tokens
    assert tokens.shape[2] == 32
    tokens.square().sum().backward()
    names = dict(run.method.named_parameters())
    first = [p.grad for n, p in names.items() if "blocks.0.attn" in n and p.requires_grad]
    second = [p.grad for n, p in names.items() if "blocks.1.attn" in n]
    assert any(grad is not None and grad.abs().max() > 0 for grad in first)
    assert all(grad is None for grad in second)


def test_regularized_views_are_the_first_ones():
    tokens = torch.randn(6, 4, 3, requires_grad=True)
    output = MethodOutput(tokens.sum() * 0, tokens, views=3)
    backward(output, schedule(dse_weight=1.0).at(0), views=2)
    assert tokens.grad[:4].abs().max() > 0
    assert torch.equal(tokens.grad[4:], torch.zeros(2, 4, 3))


# ---------------------------------------------------------------- memory and precision


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path, monkeypatch):
    """Without batch normalization and with a loss that is a mean over images."""

    def same_patches(size, **_):
        """Every image has the same visible patches, in parts as in the whole."""
        indices = torch.arange(size[1]).expand(size[0], -1)
        return indices[:, :4], indices[:, 4:]

    monkeypatch.setattr("lightly.models.utils.random_token_mask", same_patches)
    args = {"decoder_dim": 24, "decoder_depth": 1}
    views = [torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)]
    gradients = []
    for parts in (1, 2):
        config = tiny_method("mae", accumulate=parts, dse_weight=0.0, method_args=args)
        built = trainer(config, tmp_path / str(parts))
        assert built._forward_and_backward(views, None).ssl_loss > 0
        named = built.method.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        assert torch.allclose(grad, gradients[1][name], rtol=1e-3, atol=1e-6), name


def test_accumulation_keeps_images_per_step_and_averages_the_log(tmp_path):
    rows = run(tiny(accumulate=2, dse_weight=0.5), tmp_path)
    assert len(rows) == 6
    for row in rows:
        assert row["dse_loss"] == pytest.approx(-0.5 * row["dse"], rel=1e-4)
        assert row["loss"] == pytest.approx(row["ssl_loss"] + row["dse_loss"])


@pytest.mark.parametrize(
    ("name", "family"), [("dino", "vit"), ("ibot", "vit"), ("mae", "vit"), ("esvit", "swin")]
)
def test_activations_computed_again_change_nothing(name, family, tmp_path):
    for again in (False, True):
        config = tiny_method(name, family, grad_checkpointing=again, steps=2, dse_weight=0.1)
        run(config, tmp_path / str(again))
    first, second = (networks(tmp_path / str(again)) for again in (False, True))
    for file, weights in first.items():
        for key, value in weights.items():
            assert torch.allclose(value, second[file][key], atol=1e-6), key


def test_activation_checkpointing_reaches_the_blocks(tmp_path):
    config = tiny_method("mae", grad_checkpointing=True, backbone_args={"depth": 1})
    built = trainer(config, tmp_path)
    assert built.method.encoder.backbone.model.grad_checkpointing
    built.method([torch.randn(2, 3, 32, 32)], 0)
    assert built.method.encoder.masked.grad_checkpointing


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_every_kind_of_method(precision, tmp_path):
    for name in ("dino", "ibot", "ijepa", "byol", "swav", "vicregl", "densecl", "mugs", "esvit"):
        config = tiny_method(name, precision=precision, steps=3, dse_weight=0.1)
        rows = run(config, tmp_path / name)
        assert len(rows) == 3
        taken = [row for row in rows if not row["step_skipped"]]
        assert all(math.isfinite(row["loss"]) for row in taken), name
        assert precision == "float16" or len(taken) == 3
        weights = networks(tmp_path / name)["step_0000003.pt"]
        assert all(torch.isfinite(v).all() for v in weights.values() if v.is_floating_point())


def scaled_by(built, scale):
    """A scale that suits the first steps: the gradient of this network is in the thousands."""
    built.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return built


def test_float16_follows_float32(tmp_path):
    run(tiny(dse_weight=0.1), tmp_path / "single")
    scaled_by(trainer(tiny(precision="float16", dse_weight=0.1), tmp_path / "half"), 16.0).run()
    single, half = (read_lines(tmp_path / p / "metrics.jsonl") for p in ("single", "half"))
    assert not any(row["step_skipped"] for row in half)
    for name in ("loss", "dse", "grad_norm"):
        expected = pytest.approx([row[name] for row in single], rel=3e-2)
        assert [row[name] for row in half] == expected


def poison(built, step):
    """Makes the loss of one step NaN, and the running statistics with it."""
    forward = built._forward

    def poisoned(views, current):
        output = forward(views, current)
        if current != step:
            return output
        for buffer in built.method.buffers():
            if buffer.is_floating_point():
                buffer.fill_(math.nan)
        return MethodOutput(output.loss * math.nan, output.patch_tokens, output.views)

    built._forward = poisoned


def test_step_that_is_not_finite_is_skipped_cleanly_and_counted(tmp_path):
    built = scaled_by(trainer(tiny(precision="float16"), tmp_path), 16.0)
    poison(built, 2)
    before = {}

    def look(row):
        state = {k: v.clone() for k, v in built.method.state_dict().items()}
        if row["step"] == 2:
            before.update(state, scale=built.scaler.get_scale())
        if row["step"] == 3:
            assert row["step_skipped"]
            assert built.scaler.get_scale() == before.pop("scale") / 2
            assert all(torch.equal(state[key], value) for key, value in before.items())

    built.run(look)
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["step_skipped"] for row in rows] == [False, False, True, False, False, False]
    assert all(math.isfinite(row["loss"]) for row in rows if not row["step_skipped"])
    assert all(torch.isfinite(v).all() for v in built.method.state_dict().values())


def test_skipped_steps_are_in_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_forward_and_backward", _always(Trainer, {1}))
    result = train(tiny(precision="float16", steps=2, checkpoints=1), tmp_path)
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert rows[1]["step_skipped"]
    assert result.summary["training"]["skipped_steps"] == sum(r["step_skipped"] for r in rows)


def _always(owner, steps):
    original = owner._forward_and_backward

    def infinite(self, views, regularizer):
        values = original(self, views, regularizer)
        if self.step in steps:
            for parameter in self.method.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)
        return values

    return infinite


def test_run_without_a_finite_gradient_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("dse_ext.ssl.trainer._SKIPPED_AT_MOST", 3)
    monkeypatch.setattr(Trainer, "_forward_and_backward", _always(Trainer, set(range(99))))
    with pytest.raises(TrainingDiverged, match="no gradient was finite in the 3 steps up to 3"):
        run(tiny(precision="float16"), tmp_path)


def test_float16_run_is_resumed_to_the_same_result(tmp_path):
    config = tiny(precision="float16")
    whole = run(config, tmp_path / "whole")
    first = trainer(config, tmp_path / "parts")

    def stop(row):
        if row["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        first.run(stop)
    second = trainer(config, tmp_path / "parts")
    assert second.resume()
    second.run()
    assert_same_networks(tmp_path / "whole", tmp_path / "parts")
    assert without_times(read_lines(tmp_path / "parts" / "metrics.jsonl")) == without_times(whole)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_optimizers_train(optimizer, tmp_path):
    run(tiny(optimizer=optimizer, lr=0.1), tmp_path)
    kept = networks(tmp_path)
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(kept["step_0000000.pt"][key], kept["step_0000006.pt"][key])


def test_compiled_step_is_the_step(tmp_path, monkeypatch):
    """The graph is captured; the eager backend stands in for a compiler, which takes minutes."""
    calls = []
    compile_ = torch.compile

    def eager(module):
        calls.append(module)
        return compile_(module, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    plain = run(tiny(steps=3), tmp_path / "plain")
    compiled = run(tiny(steps=3, compile=True), tmp_path / "compiled")
    assert len(calls) == 1
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain])
    assert_same_networks(tmp_path / "plain", tmp_path / "compiled")


# ---------------------------------------------------------------- starting from a checkpoint


@pytest.fixture(scope="module")
def source_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("source")
    run(tiny(seed=7), out)
    return out


def first_weights(config, out):
    return trainer(config, out).method.state_dict()


def test_run_starts_from_a_kept_network(source_run, tmp_path):
    path = source_run / "checkpoints" / "step_0000006.pt"
    state = first_weights(tiny(init=str(path)), tmp_path)
    kept = torch.load(path, weights_only=True)["state_dict"]
    for key, value in kept.items():
        assert torch.equal(state[f"student.model.{key}"], value)
        assert torch.equal(state[f"teacher.model.{key}"], value)


def test_run_starts_from_a_saved_run_with_its_heads(source_run, tmp_path):
    state = first_weights(tiny(init=str(source_run / "resume.pt")), tmp_path)
    saved = torch.load(source_run / "resume.pt", weights_only=True)["method"]
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)


def test_run_starts_from_official_weights(tmp_path):
    backbone = create_backbone("vit_tiny_patch16_224", 32, 8, TINY["backbone_args"])
    weights = {f"module.backbone.{k}": v for k, v in backbone.model.state_dict().items()}
    torch.save({"teacher": weights, "epoch": 3}, tmp_path / "checkpoint0003.pth")
    config = tiny(init=str(tmp_path / "checkpoint0003.pth"))
    state = first_weights(config, tmp_path / "run")
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(state[f"student.model.{key}"], value)
    again = first_weights(
        tiny_method(
            "mae",
            init=config.init,
            init_format="dino",
            backbone_args=TINY["backbone_args"],
        ),
        tmp_path / "mae",
    )
    token = again["encoder.backbone.model.cls_token"]
    assert torch.equal(token, weights["module.backbone.cls_token"])


def test_network_of_the_run_need_not_be_repeated(source_run):
    path = source_run / "checkpoints" / "step_0000006.pt"
    config = merge_options({"init": str(path), "steps": 5, "checkpoints": 1})
    assert config.backbone_args == TINY["backbone_args"]
    assert (config.image_size, config.patch_size) == (32, 8)
    assert config.method_args == TINY["method_args"]
    assert config.steps == 5
    other = merge_options({"init": str(path), "method": "ijepa"})
    assert other.backbone_args == TINY["backbone_args"]  # and not those of I-JEPA's recipe
    assert other.method_args == {}


def test_continued_run_is_scored_from_the_given_network(source_run, tmp_path):
    path = source_run / "checkpoints" / "step_0000006.pt"
    result = train(tiny(init=str(path), steps=2, checkpoints=1), tmp_path)
    given = torch.load(path, weights_only=True)["state_dict"]
    start = networks(tmp_path)["step_0000000.pt"]
    assert all(torch.equal(start[key], given[key]) for key in given)
    assert "given, for comparison" in result.report.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "/no/such/file.pt"}, "init must be a checkpoint file, got '/no/such/file.pt'"),
        ({"backbone_args": {"embed_dim": 16, "depth": 1, "num_heads": 2}}, "init: .*do not fit"),
        ({"init_format": "dyno"}, "init: method must be one of "),
        ({"init_format": "dino"}, "cannot be read as a checkpoint of dino"),
    ],
)
def test_checkpoint_that_does_not_fit_is_named(source_run, tmp_path, changes, message):
    path = str(source_run / "checkpoints" / "step_0000006.pt")
    with pytest.raises(ConfigError, match=message):
        trainer(tiny(**{"init": path, **changes}), tmp_path)


def test_saved_run_of_another_method_does_not_fit(source_run, tmp_path):
    config = tiny_method("mae", init=str(source_run / "resume.pt"))
    with pytest.raises(ConfigError, match="does not fit method mae with backbone vit_tiny"):
        trainer(config, tmp_path)


def test_resumed_run_does_not_read_its_start_again(source_run, tmp_path):
    path = tmp_path / "start.pt"
    path.write_bytes((source_run / "resume.pt").read_bytes())
    target = tmp_path / "resume.pt"
    path.rename(target)
    config = tiny(init=str(target), steps=2, checkpoints=2)
    run(config, tmp_path / "run")
    target.unlink()
    resumed = trainer(copy.deepcopy(config), tmp_path / "run")
    assert resumed.resume()
    assert resumed.step == 2
