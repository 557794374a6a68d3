"""The training loop: one for every method."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dse_ext.data import ImageSource
from dse_ext.regularizer import DSERegularizer
from dse_ext.ssl.backbone import DenseBackbone, create_backbone
from dse_ext.ssl.config import ConfigError, TrainConfig, available_cores
from dse_ext.ssl.initialization import load_method, start_from
from dse_ext.ssl.loader import AugmentedViews, Batch, StepSampler, batches
from dse_ext.ssl.methods import Method, MethodOutput, find_method
from dse_ext.ssl.objective import Regularized, backward, mean
from dse_ext.ssl.optimizer import create_optimizer
from dse_ext.ssl.randomness import random_state, seed_all, set_random_state
from dse_ext.ssl.regularization import Regularization
from dse_ext.ssl.storage import (
    RunFolder,
    append_line,
    load_tensors,
    read_lines,
    save_tensors,
    write_lines,
)

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SKIPPED_AT_MOST = 50
"""Steps in a row whose gradient may be infinite: far more than the scale of the loss needs."""

StepRow = dict[str, Any]
"""One line of ``metrics.jsonl``."""


class Interrupted(Exception):
    """The run was asked to stop; its state has been saved.

    Attributes:
        step: Number of steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


class Trainer:
    """Trains one network and keeps checkpoints of it.

    Attributes:
        step: Number of optimizer steps done.
        method: The method with all networks.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, source: ImageSource, device: torch.device
    ) -> None:
        """Builds networks and optimizer, untrained or as the configuration's checkpoint has them.

        Args:
            config: The configuration.
            folder: Where the run is kept.
            source: The images.
            device: Where the networks live.

        Raises:
            ConfigError: If backbone, method or checkpoint do not fit the configuration.
        """
        self.config = config
        self.folder = folder
        self.source = source
        self.device = device
        self.step = 0
        seed_all(config.seed)
        backbone = create_backbone(
            config.backbone, config.image_size, config.patch_size, config.backbone_args
        )
        # A run that is continued has left its start behind.
        start = None if folder.state.is_file() else start_from(config, backbone)
        self.method = self._create_method(backbone)
        if start is not None:
            load_method(self.method, start, config)
        self.method.to(device).train()
        # After the method has made its copies (teachers), which are not regularized.
        backbone.tap(config.dse_layer)
        if config.grad_checkpointing:
            _checkpoint_activations(backbone, config.backbone)
        self._forward: Callable[[list[Tensor], int], MethodOutput] = (
            torch.compile(self.method) if config.compile else self.method
        )
        self.optimizer = create_optimizer(config, self.method)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.dse_generator = torch.Generator(device).manual_seed(config.seed)
        self.regularization = Regularization(config, self.dse_generator)
        self._skipped_in_a_row = 0
        self._stop = False

    def _create_method(self, backbone: DenseBackbone) -> Method:
        config, kind = self.config, find_method(self.config.method)
        images = config.batch_size // config.accumulate
        if images < kind.min_batch:
            raise ConfigError(
                f"method {kind.name} compares the images of a batch: batch_size / accumulate must "
                f"be >= {kind.min_batch}, got {config.batch_size} / {config.accumulate}."
            )
        return kind.create(backbone, config.image_size, config.steps, config.method_args)

    # ------------------------------------------------------------------ the loop

    def run(self, on_step: Callable[[StepRow], None] = lambda row: None) -> None:
        """Trains to the last step, from wherever the run stands.

        Args:
            on_step: Called after each step with its row of the log.

        Raises:
            Interrupted: If SIGINT or SIGTERM arrived; the state has been saved.
            TrainingDiverged: If the loss became infinite or NaN, or (in float16) no gradient was
                finite for many steps.
        """
        config = self.config
        if self.step == 0:
            self._keep()
        sampler = StepSampler(
            len(self.source), config.batch_size, self.step, config.steps, config.seed
        )
        loader = batches(
            AugmentedViews(self.source, self.method.transform(), config.seed),
            sampler,
            workers=worker_count(config),
            pin_memory=self.device.type == "cuda",
        )
        kept = set(config.checkpoint_steps())
        self._stop = False
        with self._signals(), use_threads(config):
            waited = time.perf_counter()
            for batch in loader:
                started = time.perf_counter()
                row = self._train_step(batch)
                row["data_seconds"] = started - waited
                append_line(self.folder.metrics, row)
                self._check(row)
                on_step(row)
                # Read once: a signal during the save below is for the next step to see.
                stop = self._stop
                if self.step in kept:
                    self._keep()
                if self.step in kept or self.step % config.save_every == 0 or stop:
                    self.save()
                if stop and self.step < config.steps:
                    raise Interrupted(self.step)
                waited = time.perf_counter()

    def _check(self, row: StepRow) -> None:
        """Raises TrainingDiverged if going on makes no sense."""
        config = self.config
        advice = (
            f"try a smaller lr than {config.lr} or a smaller dse-weight than {config.dse_weight}."
        )
        if not row["step_skipped"]:
            self._skipped_in_a_row = 0
            if not math.isfinite(row["loss"]):
                raise TrainingDiverged(
                    f"the loss became {row['loss']} at step {row['step']}: {advice}"
                )
            return
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == _SKIPPED_AT_MOST:
            raise TrainingDiverged(
                f"no gradient was finite in the {_SKIPPED_AT_MOST} steps up to {row['step']}: "
                f"{advice}"
            )

    def _train_step(self, batch: Batch) -> StepRow:
        config, method = self.config, self.method
        started = time.perf_counter()
        self._schedule()
        views = [view.to(self.device, non_blocking=True) for view in batch.views]
        scaled = self.scaler.is_enabled()
        # A pass in float16 may fill running statistics, centres and queues with NaN.
        before = {n: b.clone() for n, b in method.named_buffers()} if scaled else {}
        regularizer = self.regularization.at(self.step)
        values = self._forward_and_backward(views, regularizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_grad or math.inf)
        skipped = scaled and not math.isfinite(float(norm))
        if skipped:
            with torch.no_grad():
                for name, buffer in method.named_buffers():
                    buffer.copy_(before[name])
        else:
            method.before_optimizer(self.step)
            self.optimizer.step()
            self.regularization.observe(values.components)
        self.optimizer.zero_grad(set_to_none=True)
        if not skipped:
            method.after_optimizer(self.step)
        if scaled:
            self.scaler.update()
        grad_norm = float(norm)  # waits for the device, so that the time below is the step's
        self.step += 1
        weights = {} if regularizer is None else {
            "dse_weight": regularizer.weight, "dim_weight": regularizer.dim_weight
        }  # fmt: skip
        return {
            "step": self.step,
            "loss": values.loss,
            "ssl_loss": values.ssl_loss,
            "dse_loss": values.dse_loss,
            **values.components,
            **weights,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "step_skipped": skipped,
            "step_seconds": time.perf_counter() - started,
            "dse_seconds": values.seconds,
            "skipped": list(batch.skipped),
        }

    def _forward_and_backward(
        self, views: list[Tensor], regularizer: DSERegularizer | None
    ) -> Regularized:
        """Gradients of a batch, all at once or in equal parts one after the other."""
        config = self.config
        parts = zip(*(view.chunk(config.accumulate) for view in views), strict=True)
        scale = 1.0 / config.accumulate
        if self.scaler.is_enabled():
            scale = float(self.scaler.scale(torch.full((), scale, device=self.device)))
        values = []
        for part in parts:
            with torch.autocast(
                self.device.type,
                dtype=_AUTOCAST.get(config.precision, torch.bfloat16),
                enabled=config.precision in _AUTOCAST,
            ):
                output = self._forward(list(part), self.step)
            values.append(backward(output, regularizer, scale=scale, views=config.dse_views))
        return mean(values)

    def _schedule(self) -> None:
        """Learning rate: linear warm-up, then cosine; weight decay: cosine."""
        from lightly.utils.scheduler import cosine_schedule

        c = self.config
        warmup = round(c.warmup * c.steps)
        if self.step < warmup:
            lr = c.lr * (self.step + 1) / warmup
        else:
            lr = cosine_schedule(self.step - warmup, c.steps - warmup, c.lr, c.min_lr)
        decay = cosine_schedule(self.step, c.steps, c.weight_decay, c.weight_decay_end)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if group["decay"]:
                group["weight_decay"] = decay

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turns the first SIGINT or SIGTERM into a stop after the current step."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------ state

    def _keep(self) -> None:
        """Keeps the network as it is now as a checkpoint."""
        save_tensors(
            self.folder.checkpoint(self.step),
            {
                "step": self.step,
                "backbone": self.config.backbone,
                "state_dict": self.method.scored().model.state_dict(),
            },
        )

    def save(self) -> None:
        """Writes everything that the rest of the run depends on."""
        save_tensors(
            self.folder.state,
            {
                "step": self.step,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": random_state(self.device),
                "dse_generator": self.dse_generator.get_state(),
                "regularization": self.regularization.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        )

    def resume(self) -> bool:
        """Continues from the last saved state.

        Returns:
            Whether there was one.
        """
        if not self.folder.state.is_file():
            return False
        state = load_tensors(self.folder.state)
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.dse_generator.set_state(state["dse_generator"])
        # States of older versions have neither.
        if "regularization" in state:
            self.regularization.load_state_dict(state["regularization"])
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"], self.device)
        self.step = int(state["step"])
        # Steps that were logged but not saved will be done again.
        rows = [row for row in read_lines(self.folder.metrics) if row["step"] <= self.step]
        write_lines(self.folder.metrics, rows)
        return True


def _checkpoint_activations(backbone: DenseBackbone, name: str) -> None:
    """Has a timm model compute its activations again in the backward pass."""
    try:
        backbone.model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        raise ConfigError(f"grad_checkpointing: {name} does not support it.") from error


def worker_count(config: TrainConfig) -> int:
    """Number of processes that prepare images: as configured, or by the number of cores."""
    if config.workers >= 0:
        return config.workers
    # Two cores: one worker is busy a part of the time only, see thread_count.
    return min(max(available_cores() // 2, 1), 8) if available_cores() > 1 else 0


def thread_count(config: TrainConfig) -> int:
    """Number of CPU threads of the training process: as configured, or all cores."""
    return config.threads or available_cores()


@contextmanager
def use_threads(config: TrainConfig) -> Iterator[None]:
    """Runs torch with the configured number of CPU threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(thread_count(config))
    try:
        yield
    finally:
        torch.set_num_threads(before)
