"""When, how strongly and with which λ DSE takes part in training."""

from __future__ import annotations

import math
from typing import Any

import torch

from dse_ext.regularizer import DSERegularizer
from dse_ext.ssl.config import AUTO, TrainConfig

_STEPS_BEFORE_LAMBDA = 10
"""λ stays 1 until this many steps have been seen: standard deviations of fewer say little."""


class RunningDeviation:
    """Standard deviation of a series, updated value by value (Welford's method).

    Attributes:
        count: Number of values.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = 0.0
        self._squares = 0.0

    def update(self, value: float) -> None:
        """Takes a value in."""
        self.count += 1
        delta = value - self._mean
        self._mean += delta / self.count
        self._squares += delta * (value - self._mean)

    @property
    def value(self) -> float:
        """The standard deviation so far; 0 of fewer than two values."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def state(self) -> list[float]:
        """What :meth:`load` restores."""
        return [self.count, self._mean, self._squares]

    def load(self, state: list[float]) -> None:
        """Restores what :meth:`state` returned."""
        self.count, self._mean, self._squares = int(state[0]), float(state[1]), float(state[2])


class Regularization:
    """The regularizer of a run with its schedule.

    β rises linearly over ``dse_warmup`` and is β from then on, at every ``dse_every``-th step. With
    ``dim_weight="auto"``, λ = Std(M_inter − M_intra) / Std(M_dim) over the steps of the run so
    far: the definition that holds for the checkpoints of a run, followed while it goes on.

    Attributes:
        regularizer: The loss term; None if the run has none.
    """

    def __init__(self, config: TrainConfig, generator: torch.Generator) -> None:
        """Creates the regularizer.

        Args:
            config: The run's configuration.
            generator: Source of randomness of its own, so that a run's other draws do not depend
                on it.
        """
        self.config = config
        self.regularizer: DSERegularizer | None = None
        if config.dse_weight > 0:
            self.regularizer = DSERegularizer(
                weight=config.dse_weight,
                local_clusters=config.local_clusters,
                global_clusters=config.global_clusters,
                dim_weight=1.0 if config.dim_weight == AUTO else float(config.dim_weight),
                generator=generator,
            )
        self._relevance = RunningDeviation()
        self._dim = RunningDeviation()

    def at(self, step: int) -> DSERegularizer | None:
        """The regularizer with the weights of a step; None where it takes no part.

        Args:
            step: Number of optimizer steps done so far.
        """
        if self.regularizer is None or step % self.config.dse_every:
            return None
        warmup = round(self.config.dse_warmup * self.config.steps)
        share = min((step + 1) / warmup, 1.0) if warmup else 1.0
        self.regularizer.weight = self.config.dse_weight * share
        if self.config.dim_weight == AUTO:
            self.regularizer.dim_weight = self._dim_weight()
        return self.regularizer

    def observe(self, components: dict[str, float]) -> None:
        """Takes in the components of a step; those that are not finite are left out.

        Args:
            components: Components of DSE by name; empty if it took no part.
        """
        if not components:
            return
        spread = (components["m_intra_image"] + components["m_intra_batch"]) / 2
        relevance, dim = components["m_inter"] - spread, components["m_dim"]
        if math.isfinite(relevance) and math.isfinite(dim):
            self._relevance.update(relevance)
            self._dim.update(dim)

    def _dim_weight(self) -> float:
        numerator, denominator = self._relevance.value, self._dim.value
        if self._dim.count < _STEPS_BEFORE_LAMBDA or not (numerator > 0 and denominator > 0):
            return 1.0
        return numerator / denominator

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"relevance": self._relevance.state(), "dim": self._dim.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._relevance.load(state["relevance"])
        self._dim.load(state["dim"])
