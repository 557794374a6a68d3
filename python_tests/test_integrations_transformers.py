"""The Trainer mixin trains as a loop that adds the regularizer by hand."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import features
import pytest
import torch
from torch import Tensor, nn

import dse_ext
from dse_ext.hooks import DenseFeatures

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dse_ext.integrations.transformers import (  # noqa: E402
    DSEMonitorCallback,
    DSETrainerMixin,
)

OPTIONS = {"local_clusters": 2, "global_clusters": 4, "group_images": 2}


class Trainer(DSETrainerMixin, transformers.Trainer):  # type: ignore[misc]
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def data() -> list[dict[str, Tensor]]:
    images = features.normal(12, 3, 32, 32).float()
    return [
        {"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)
    ]


def regularizer() -> dse_ext.DSERegularizer:
    return dse_ext.DSERegularizer(0.1, generator=torch.Generator().manual_seed(0), **OPTIONS)


def arguments(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 1,
        "learning_rate": 1e-2, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **options})


def train(folder: Path, callbacks: Any = (), dse: Any = None, **options: Any) -> Trainer:
    trainer = Trainer(
        model=network(), args=arguments(folder, **options), train_dataset=data(),
        dse_regularizer=regularizer() if dse is None else dse, dse_module="vit",
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return trainer


def by_hand(batch_size: int = 4, accumulate: int = 1) -> nn.Module:
    model, term = network().train(), regularizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    samples = data()
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    with DenseFeatures(model) as dense:
        for group in groups:
            for batch in group:
                images = torch.stack([sample["pixel_values"] for sample in batch])
                labels = torch.stack([sample["labels"] for sample in batch])
                loss = model(pixel_values=images, labels=labels).loss + term(dense.take())
                (loss / len(group)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, ours), expected in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, msg=lambda text, n=name: f"{n}: {text}")


def test_it_trains_as_by_hand(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    assert_same(trainer.model, by_hand())
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 3
    assert all({"dse/m_inter", "dse/m_dim", "dse/score"} <= row.keys() for row in logs)
    last = trainer.dse_penalty.regularizer.last
    assert last is not None
    assert logs[-1]["dse/score"] == pytest.approx(float(last.score()))


def test_the_regularizer_changes_something(tmp_path: Path) -> None:
    plain = train(tmp_path, dse=0.0).model
    change = [
        (a - b).abs().max() for a, b in zip(plain.parameters(), by_hand().parameters(), strict=True)
    ]
    assert max(change) > 1e-5


@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_gradients(tmp_path: Path, scaled: bool) -> None:
    """Whether the trainer divides the loss by the steps, or the model by the number of labels."""

    def total(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return loss / (2 * len(labels))

    trainer = Trainer(
        model=network(), train_dataset=data(), dse_regularizer=regularizer(), dse_module="vit",
        args=arguments(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2),
        **({"compute_loss_func": total} if scaled else {}),
    )  # fmt: skip
    trainer.train()
    assert_same(trainer.model, by_hand(batch_size=3, accumulate=2))


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    plain = transformers.Trainer(model=trainer.model, args=arguments(tmp_path))
    ours, expected = trainer.evaluate(data()), plain.evaluate(data())
    assert ours["eval_loss"] == expected["eval_loss"]


def test_a_masked_autoencoder(tmp_path: Path) -> None:
    """Pre-training without labels: the encoder's visible patches."""
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    images = [{"pixel_values": sample["pixel_values"]} for sample in data()]
    trainer = Trainer(
        model=transformers.ViTMAEForPreTraining(config), args=arguments(tmp_path),
        train_dataset=images, dse_module="vit",
    )  # fmt: skip
    trainer.train()
    last = trainer.dse_penalty.regularizer.last
    assert last is not None
    assert last.local_labels.shape == (4, 4)


def probe() -> Tensor:
    return features.normal(8, 3, 32, 32, seed=1).float()


def test_the_monitor(tmp_path: Path) -> None:
    callback = DSEMonitorCallback(probe(), module="vit", every=1, folder=tmp_path / "dse", keep=1)
    trainer = train(tmp_path, [callback])
    assert callback.monitor is not None
    assert [e.step for e in callback.monitor.history] == [1, 2, 3]
    rows = [row for row in trainer.state.log_history if "dse_monitor/score" in row]
    assert [row["dse_monitor/score"] for row in rows] == [e.score for e in callback.monitor.history]
    assert len(list((tmp_path / "dse").glob("*.pt"))) == 1
    assert_same(trainer.model, by_hand())  # only watched


def test_the_monitor_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dse_ext.monitor import DSEMonitor

    monkeypatch.setattr(DSEMonitor, "_judge", lambda self: setattr(self, "should_stop", True))
    trainer = train(tmp_path, [DSEMonitorCallback(probe(), module="vit", every=2)])
    assert trainer.state.global_step == 2


def test_the_monitor_resumes_with_the_trainer(tmp_path: Path) -> None:
    first = DSEMonitorCallback(probe(), module="vit", every=1)
    train(tmp_path, [first], save_strategy="steps", save_steps=2)
    assert first.monitor is not None
    saved = json.loads((tmp_path / "checkpoint-2" / "dse_monitor.json").read_text())
    assert [e["step"] for e in saved["history"]] == [1, 2]

    second = DSEMonitorCallback(probe(), module="vit", every=1)
    trainer = Trainer(
        model=network(), args=arguments(tmp_path), train_dataset=data(), callbacks=[second],
        dse_regularizer=regularizer(), dse_module="vit",
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.monitor is not None
    assert [e.step for e in second.monitor.history] == [1, 2, 3]
    assert second.monitor.history[:2] == first.monitor.history[:2]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'backbone'; it consists of 'vit', 'classifier'"):
        Trainer(model=network(), args=arguments(tmp_path), dse_module="backbone")
    with pytest.raises(ValueError, match="layer must be the name of a module"):
        Trainer(model=network(), args=arguments(tmp_path), dse_layer="norm")
    with pytest.raises(ValueError, match="views must be >= 1 or None, got 0"):
        Trainer(model=network(), args=arguments(tmp_path), dse_views=0)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "dse_ext.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'dse-ext\[transformers\]'"):
        importlib.import_module("dse_ext.integrations.transformers")
