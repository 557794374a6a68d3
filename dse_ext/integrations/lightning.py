"""Callbacks for Lightning: DSE as a regularizer, and as a monitor.

For ``lightning`` (``import lightning``) and for its older name ``pytorch_lightning``::

    trainer = lightning.Trainer(
        callbacks=[
            DSERegularizerCallback(0.001, module="backbone"),
            DSEMonitorCallback(probe_images, module="backbone", every=500, folder="runs/dse"),
        ]
    )
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dse_ext.integrations.penalty import FeaturePenalty, submodule
from dse_ext.monitor import DSEMonitor
from dse_ext.regularizer import DSERegularizer

__all__ = ["DSEMonitorCallback", "DSERegularizerCallback"]


def _callback_class() -> Any:
    """The base class of the Lightning that the caller uses; both hand over the same arguments."""
    names = ("lightning.pytorch", "pytorch_lightning")
    loaded = [name for name in names if name in sys.modules]
    for name in loaded or names:
        try:
            module = __import__(name, fromlist=["Callback"])
        except ImportError:
            continue
        return module.Callback
    raise ImportError(
        "dse_ext.integrations.lightning needs Lightning: pip install 'dse-ext[lightning]'."
    )


Callback: Any = _callback_class()


class DSERegularizerCallback(Callback):  # type: ignore[misc]
    """Adds ``-weight * DSE`` of a layer's features to the loss of ``training_step``.

    The term joins the loss that ``training_step`` returns (a tensor, or a dict with ``"loss"``), so
    that mixed precision, gradient accumulation and distributed strategies treat it as they treat
    the loss. Its components are logged as ``dse/...``, the loss without it as ``dse/ssl_loss``.

    Args:
        regularizer:
            The regularizer, or its weight (the paper trains with 0.001). With several devices,
            ``DSERegularizer(..., process_group="world")`` measures the global batch.
        module:
            Name of the backbone within the ``LightningModule``, such as ``"backbone"``.
        layer:
            Layer of the backbone, see :class:`dse_ext.hooks.DenseFeatures`.
        views:
            How many of the layer's calls in a step are regularized, see
            :class:`dse_ext.integrations.FeaturePenalty`.

    Raises:
        ValueError: When training starts, if there is no such module or layer.
        RuntimeError: When training starts, if the module optimizes manually: there is no loss to
            add to. Use :class:`dse_ext.integrations.FeaturePenalty` in ``training_step`` then.
    """

    def __init__(
        self,
        regularizer: DSERegularizer | float = 0.001,
        *,
        module: str = "",
        layer: str | int | None = None,
        views: int | None = None,
    ) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.module = module
        self.layer = layer
        self.views = views
        self.penalty: FeaturePenalty | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hooks the layer and wraps ``training_step``."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                f"{type(pl_module).__name__} optimizes manually (automatic_optimization = False), "
                "so there is no returned loss to regularize: add "
                "dse_ext.integrations.FeaturePenalty's term to the loss in training_step."
            )
        penalty = FeaturePenalty(
            submodule(pl_module, self.module),
            self.regularizer,
            layer=self.layer,
            views=self.views,
        )
        self.penalty = penalty
        training_step: Callable[..., Any] = pl_module.training_step

        def regularized(*args: Any, **kwargs: Any) -> Any:
            with penalty.step():
                output = training_step(*args, **kwargs)
                if output is None:
                    return None  # a step that is skipped
                loss = output["loss"] if isinstance(output, Mapping) else output
                term = penalty.term()
            pl_module.log_dict({"dse/ssl_loss": loss.detach(), **penalty.logs()})
            total: Tensor = loss + term
            return {**output, "loss": total} if isinstance(output, Mapping) else total

        pl_module.training_step = regularized

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives the module its own ``training_step`` back."""
        self._remove(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Gives the module its own ``training_step`` back."""
        self._remove(pl_module)

    def _remove(self, pl_module: Any) -> None:
        if self.penalty is not None:
            self.penalty.remove()
            self.penalty = None
            del pl_module.training_step  # the instance's; the class has its own


class DSEMonitorCallback(Callback):  # type: ignore[misc]
    """Runs a :class:`dse_ext.monitor.DSEMonitor` during training.

    Each evaluation is logged as ``dse_monitor/score`` and so on. The history is part of Lightning's
    checkpoints, so that a resumed run goes on with it.

    Args:
        probe:
            Images ``(P, 3, H, W)``, normalized as in training.
        module:
            Name of the backbone within the ``LightningModule``.
        **options:
            Arguments of :class:`dse_ext.monitor.DSEMonitor`: ``every``, ``layer``, ``folder``,
            ``early_stop`` and so on. Steps are optimizer steps.

    Attributes:
        monitor: The monitor; None before training starts.
    """

    def __init__(self, probe: Tensor, *, module: str = "", **options: Any) -> None:
        super().__init__()
        self.probe = probe
        self.module = module
        self.options = options
        self.monitor: DSEMonitor | None = None
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Creates the monitor."""
        self.monitor = DSEMonitor(submodule(pl_module, self.module), self.probe, **self.options)
        if self._loaded is not None:
            self.monitor.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates if it is time."""
        monitor, step = self.monitor, trainer.global_step
        assert monitor is not None  # on_fit_start has run
        # While gradients accumulate the step does not move on.
        if step == 0 or (monitor.history and step <= monitor.history[-1].step):
            return
        evaluation = monitor.step(step)
        if evaluation is not None:
            names = ("score", "class_relevance", "m_dim", "drop")
            pl_module.log_dict({f"dse_monitor/{name}": getattr(evaluation, name) for name in names})
        if monitor.should_stop:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What Lightning's checkpoint holds of the monitor."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the monitor that training will create."""
        self._loaded = state_dict or None
