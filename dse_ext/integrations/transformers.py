"""DSE in the Hugging Face ``Trainer``: as a regularizer (a mixin) and as a monitor (a callback).

::

    class MyTrainer(DSETrainerMixin, transformers.Trainer):
        pass

    trainer = MyTrainer(model=model, args=args, train_dataset=data, dse_regularizer=0.001,
                        callbacks=[DSEMonitorCallback(probe_images, every=500)])
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dse_ext.files import save_text
from dse_ext.integrations.penalty import FeaturePenalty, submodule
from dse_ext.monitor import DSEMonitor
from dse_ext.regularizer import DSERegularizer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "dse_ext.integrations.transformers needs Transformers and Accelerate: "
        "pip install 'dse-ext[transformers]'."
    ) from error

__all__ = ["DSEMonitorCallback", "DSETrainerMixin"]

_STATE = "dse_monitor.json"


class DSETrainerMixin:
    """Adds ``-weight * DSE`` of a layer's features to the training loss; goes before ``Trainer``.

    It extends ``compute_loss`` and takes its scaling for gradient accumulation into account. The
    evaluation loss is left alone. Components appear in the logs as ``dse/...``.

    Args:
        *args:
            Arguments of the ``Trainer``.
        dse_regularizer:
            The regularizer, or its weight (the paper trains with 0.001). On several devices,
            ``DSERegularizer(..., process_group="world")`` measures the global batch.
        dse_module:
            Name of the backbone within the model, such as ``"vit"``; the model itself by default.
        dse_layer:
            Layer whose features are regularized, see :class:`dse_ext.hooks.DenseFeatures`. By
            default the last hidden state.
        dse_views:
            How many of the layer's calls in a step are regularized, see
            :class:`dse_ext.integrations.FeaturePenalty`.
        **kwargs:
            Keyword arguments of the ``Trainer``.

    Raises:
        ValueError: If there is no such module or layer.
    """

    def __init__(
        self,
        *args: Any,
        dse_regularizer: DSERegularizer | float = 0.001,
        dse_module: str = "",
        dse_layer: str | int | None = None,
        dse_views: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.dse_penalty = FeaturePenalty(
            submodule(trainer.model, dse_module), dse_regularizer, layer=dse_layer, views=dse_views
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's loss, plus the regularizer's while the model is in training mode."""
        trainer: Any = super()
        if not model.training:
            return trainer.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        with self.dse_penalty.step():
            loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, **kwargs)
            term = self.dse_penalty.term()
        if self._is_scaled(kwargs.get("num_items_in_batch")):
            # The loss is a part of the accumulated batch's mean already; the term is not yet.
            term = term / self._accumulation_steps()
        loss = loss + term
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the components of DSE beside the training loss."""
        trainer: Any = super()
        if "loss" in logs:
            values = {name: float(v) for name, v in self.dse_penalty.logs().items()}
            logs = {**logs, **values}
        trainer.log(logs, *args, **kwargs)

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether ``training_step`` leaves the loss as it is, instead of dividing it."""
        trainer: Any = self
        told: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
        if told is not None:
            return told
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or trainer.compute_loss_func is not None)

    def _accumulation_steps(self) -> int:
        trainer: Any = self
        steps = trainer.args.gradient_accumulation_steps
        return int(getattr(trainer, "current_gradient_accumulation_steps", steps))


class DSEMonitorCallback(TrainerCallback):
    """Runs a :class:`dse_ext.monitor.DSEMonitor` during training.

    Evaluations are added to the trainer's ``log_history`` as ``dse_monitor/score`` and so on. The
    history is saved with the trainer's checkpoints (``checkpoint-*/dse_monitor.json``), so that
    training that is resumed from ``args.output_dir`` goes on with it.

    Args:
        probe:
            Images ``(P, 3, H, W)``, normalized as in training.
        module:
            Name of the backbone within the model; the model itself by default.
        **options:
            Arguments of :class:`dse_ext.monitor.DSEMonitor`: ``every``, ``layer``, ``folder``,
            ``early_stop`` and so on.

    Attributes:
        monitor: The monitor; None before training starts.
    """

    def __init__(self, probe: Tensor, *, module: str = "", **options: Any) -> None:
        self.probe = probe
        self.module = module
        self.options = options
        self.monitor: DSEMonitor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Creates the monitor, with its history where training is resumed."""
        backbone = submodule(model, self.module)
        self.monitor = DSEMonitor(backbone, self.probe, **self.options)
        path = _checkpoint(args, state) / _STATE
        if state.global_step > 0 and path.is_file():
            self.monitor.load_state_dict(json.loads(path.read_text(encoding="utf-8")))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates if it is time."""
        monitor = self.monitor
        assert monitor is not None  # on_train_begin has run
        evaluation = monitor.step(state.global_step)
        if evaluation is not None:
            names = ("score", "class_relevance", "m_dim", "drop")
            values = {f"dse_monitor/{name}": getattr(evaluation, name) for name in names}
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        if monitor.should_stop:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the history into the trainer's checkpoint."""
        if self.monitor is not None and state.is_world_process_zero:
            save_text(_checkpoint(args, state) / _STATE, json.dumps(self.monitor.state_dict()))


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
