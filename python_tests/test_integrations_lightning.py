"""The Lightning callbacks train as a loop that adds the regularizer by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import features
import pytest
import torch
from torch import Tensor, nn

import dse_ext
from dse_ext.hooks import DenseFeatures

lightning = pytest.importorskip("lightning")
from dse_ext.integrations.lightning import (  # noqa: E402
    DSEMonitorCallback,
    DSERegularizerCallback,
    _callback_class,
)

OPTIONS = {"local_clusters": 2, "global_clusters": 4, "group_images": 2}
STEPS = 3
# Lightning's own remarks about a training run without workers, loggers and checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def regularizer() -> dse_ext.DSERegularizer:
    generator = torch.Generator().manual_seed(0)
    return dse_ext.DSERegularizer(0.1, generator=generator, **OPTIONS)


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.GELU(), nn.Conv2d(8, 8, 1))


def batches(count: int = STEPS) -> list[Tensor]:
    return list(features.normal(count, 4, 3, 32, 32).float())


class Module(lightning.LightningModule):
    def __init__(self, views: int = 1, as_dict: bool = False) -> None:
        super().__init__()
        self.backbone = backbone()
        self.views = views
        self.as_dict = as_dict

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = sum(self.backbone(view).square().mean() for view in batch.chunk(self.views))
        return {"loss": loss, "kept": 1} if self.as_dict else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Module, callbacks: list[Any], folder: Path, **options: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        default_root_dir=folder, **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, ckpt_path=None)
    return trainer


def by_hand(views: int = 1, accumulate: int = 1, regularized: int | None = None) -> nn.Module:
    model, term = backbone(), regularizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    all_batches = batches()
    with DenseFeatures(model, "2", keep=None) as dense:
        for index, batch in enumerate(all_batches):
            dense.clear()
            loss = sum(model(view).square().mean() for view in batch.chunk(views))
            terms = torch.stack([term(z) for z in dense.calls[:regularized]])
            ((loss + terms.mean()) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(all_batches):
                optimizer.step()
                optimizer.zero_grad()
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for ours, expected in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("as_dict", [False, True])
def test_it_trains_as_by_hand(tmp_path: Path, as_dict: bool) -> None:
    module = Module(as_dict=as_dict)
    callback = DSERegularizerCallback(regularizer(), module="backbone", layer="2")
    trainer = fit(module, [callback], tmp_path)
    assert_same(module.backbone, by_hand())
    logged = trainer.callback_metrics
    assert {"dse/m_inter", "dse/m_dim", "dse/score", "dse/ssl_loss"} <= logged.keys()
    assert torch.isfinite(logged["dse/score"])
    # Everything is as it was.
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())


def test_the_regularizer_changes_something(tmp_path: Path) -> None:
    module = Module()
    fit(module, [], tmp_path)
    change = [
        (a - b).abs().max()
        for a, b in zip(module.parameters(), by_hand().parameters(), strict=True)
    ]
    assert max(change) > 1e-5


def test_accumulated_gradients(tmp_path: Path) -> None:
    module = Module()
    callback = DSERegularizerCallback(regularizer(), module="backbone", layer="2")
    trainer = fit(module, [callback], tmp_path, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    # Lightning divides the last, incomplete group of batches by 2 as well.
    assert_same(module.backbone, by_hand(accumulate=2))


@pytest.mark.parametrize("regularized", [None, 1])
def test_views(tmp_path: Path, regularized: int | None) -> None:
    module = Module(views=2)
    callback = DSERegularizerCallback(
        regularizer(), module="backbone", layer="2", views=regularized
    )
    fit(module, [callback], tmp_path)
    assert_same(module.backbone, by_hand(views=2, regularized=regularized))


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'encoder'; it consists of 'backbone'"):
        fit(Module(), [DSERegularizerCallback(module="encoder")], tmp_path)
    with pytest.raises(ValueError, match="layer must be the name of a module"):
        fit(Module(), [DSERegularizerCallback(module="backbone", layer="norm")], tmp_path)
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="optimizes manually"):
        fit(module, [DSERegularizerCallback(module="backbone", layer="2")], tmp_path)
    module = Module()
    module.backbone.requires_grad_(False)
    module.head = nn.Linear(1, 1)
    module.training_step = lambda batch, i: module.backbone(batch).mean() * module.head.weight
    with pytest.raises(RuntimeError, match="has not run with gradients in this step"):
        fit(module, [DSERegularizerCallback(module="backbone", layer="2")], tmp_path)


def monitor(folder: Path | None = None, **options: Any) -> DSEMonitorCallback:
    probe = features.normal(8, 3, 32, 32, seed=1).float()
    return DSEMonitorCallback(
        probe, module="backbone", layer="2", folder=folder, **{"every": 1, **options}
    )


def test_the_monitor_evaluates_logs_and_keeps(tmp_path: Path) -> None:
    module, callback = Module(), monitor(tmp_path, keep=1)
    trainer = fit(module, [callback], tmp_path)
    assert callback.monitor is not None
    assert [e.step for e in callback.monitor.history] == [1, 2, 3]
    assert float(trainer.callback_metrics["dse_monitor/score"]) == pytest.approx(
        callback.monitor.history[-1].score
    )
    assert len(list(tmp_path.glob("dse-step-*.pt"))) == 1
    plain = Module()
    fit(plain, [], tmp_path)
    assert_same(module, plain)  # only watched


def test_the_monitor_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = monitor()
    fit(Module(), [callback], tmp_path, accumulate_grad_batches=2)
    assert callback.monitor is not None
    assert [e.step for e in callback.monitor.history] == [1, 2]


def test_the_monitor_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dse_ext.monitor import DSEMonitor

    monkeypatch.setattr(DSEMonitor, "_judge", lambda self: setattr(self, "should_stop", True))
    trainer = fit(Module(), [monitor(every=2)], tmp_path)
    assert trainer.global_step == 2


def test_the_monitor_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    first = monitor()
    trainer = fit(Module(), [first], tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = monitor()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[second],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(Module(), loader, ckpt_path=tmp_path / "last.ckpt")
    assert first.monitor is not None
    assert second.monitor is not None
    assert [e.step for e in second.monitor.history] == [1, 2, 3, 4, 5, 6]
    ours, theirs = second.monitor.history[:3], first.monitor.history
    assert [e.score for e in ours] == [e.score for e in theirs]


def test_the_older_name_of_lightning(tmp_path: Path) -> None:
    """A Trainer of pytorch_lightning takes the callbacks, whichever base class they have."""
    pl = pytest.importorskip("pytorch_lightning")

    class Older(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()

        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers
        views, as_dict = 1, False

    module = Older()
    callback = DSERegularizerCallback(regularizer(), module="backbone", layer="2")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, monitor()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    assert_same(module.backbone, by_hand())


def test_the_base_class_is_that_of_the_lightning_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    assert _callback_class() is lightning.pytorch.Callback
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert _callback_class() is pl.Callback
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match=r"pip install 'dse-ext\[lightning\]'"):
        _callback_class()
