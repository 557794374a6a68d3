"""Watches the dense features of a network while it trains: DSE on a fixed probe batch.

Long self-supervised training can make dense features worse while the loss still falls
(Self-supervised Dense Degradation, https://arxiv.org/abs/2510.17299). The monitor is the
in-training form of checkpoint selection by DSE: it keeps the best checkpoints, and it says when DSE
has fallen.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dse_ext.files import replacing, save_text
from dse_ext.functional import dse_components
from dse_ext.hooks import DenseFeatures, unwrap
from dse_ext.selection import dse_lambda

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes

__all__ = ["DSEMonitor", "DenseDegradationWarning", "Evaluation"]

_COMPONENTS = ("m_inter", "m_intra_image", "m_intra_batch", "m_dim", "avg_norm")
_COLUMNS = (
    "step", "score", "drop", "noise", "fallen", *_COMPONENTS, "class_relevance", "checkpoint"
)  # fmt: skip


class DenseDegradationWarning(UserWarning):
    """DSE of the probe batch has fallen from its peak, and not by chance."""


@dataclass(frozen=True)
class Evaluation:
    """DSE of the probe batch at one step.

    Attributes:
        step: Number of optimizer steps done.
        m_inter: Component of DSE, as the ones that follow.
        m_intra_image: See :class:`dse_ext.DSEComponents`.
        m_intra_batch: See there.
        m_dim: See there.
        avg_norm: See there.
        replicates: Class relevance and ``m_dim`` of each half of the probe batch that the noise is
            estimated from.
        score: DSE.
        drop: How far DSE lies below its peak so far; 0 at the peak.
        noise: Standard error of the drop; 0 at the peak.
        fallen: Number of evaluations in a row, this one included, at which the drop was more than
            noise.
        checkpoint: File name of the checkpoint, while it is kept.
    """

    step: int
    m_inter: float
    m_intra_image: float
    m_intra_batch: float
    m_dim: float
    avg_norm: float
    replicates: tuple[tuple[float, float], ...] = ()
    score: float = math.nan
    drop: float = 0.0
    noise: float = 0.0
    fallen: int = 0
    checkpoint: str | None = None

    @property
    def class_relevance(self) -> float:
        """M_inter − M_intra."""
        return self.m_inter - (self.m_intra_image + self.m_intra_batch) / 2


class DSEMonitor:
    """Measures DSE on a fixed probe batch every few steps, keeps the best checkpoints, warns.

    **Noise.** A fall counts when it is more than ``noise_factor`` standard errors. The standard
    error is that of the *difference* to the peak: both steps are measured on the same random halves
    of the probe batch, each with a k-means seed of its own, and the standard deviation of the
    differences over the halves is the standard error of the difference on the whole batch (half
    the images have twice the variance; that they are drawn from these P images removes half of
    it). It covers the choice of images and the luck of k-means.

    **Ranks.** Under ``torch.distributed`` every rank calls :meth:`step`. All run the probe batch
    (FSDP2 needs all ranks for a forward pass), rank 0 computes DSE, and all get its numbers, so
    that they stop together. Rank 0 writes the files.

    The model is put into evaluation mode for the measurement and back, module by module; the global
    random generators are left as they were.

    Args:
        model:
            The network that is trained; may be wrapped (DDP, FSDP, ``torch.compile``).
        probe:
            Images ``(P, 3, H, W)``, normalized as in training, without augmentation; kept on the
            CPU. The paper finds 2,048 enough. All evaluations use the same ones.
        every:
            Steps between evaluations.
        layer:
            Which layer's features are measured, see :class:`dse_ext.hooks.DenseFeatures`.
        extract:
            ``extract(images)`` gives dense features ``(B, N, d)`` instead of a hook on ``layer``.
        batch_size:
            Images in a forward pass.
        folder:
            Where checkpoints and the history (``history.csv``, ``history.json``) are written, after
            every evaluation; None writes nothing.
        keep:
            Number of checkpoints to keep, those with the highest DSE; the files of others are
            removed.
        save:
            ``save(path)`` writes a checkpoint; called on every rank, so that it may gather a
            sharded model, but only rank 0 has to write. Default: the model's (gathered)
            ``state_dict`` by ``torch.save``.
        patience:
            Evaluations in a row at which DSE must have fallen before the warning.
        noise_factor:
            Standard errors that count as a fall.
        replicates:
            Number of half batches for the noise; at least 3.
        start:
            First step that counts. Evaluations before it are recorded, but are neither a peak to
            fall from nor kept: a random network can have a high DSE.
        early_stop:
            Whether :attr:`should_stop` becomes True with the warning.
        dim_weight:
            λ, or ``"std"`` for the paper's λ over the evaluations so far (1 until there are
            three). With ``"std"`` earlier scores change with every evaluation.
        variant:
            Variant of DSE; ``"evaluation"`` is the one to compare checkpoints with.
        seed:
            Seed of k-means and of the halves.
        **options:
            Further arguments of :func:`dse_ext.dse_components`, such as ``global_clusters``.

    Attributes:
        history: All evaluations, a list of :class:`Evaluation`.
        degraded: Whether DSE has fallen for ``patience`` evaluations in a row, as of the last one.
        should_stop: Whether training should stop (``early_stop``).

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> from dse_ext.monitor import DSEMonitor
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.ReLU())
        >>> monitor = DSEMonitor(model, torch.rand(16, 3, 32, 32), every=2, layer="1")
        >>> for step in range(1, 5):  # ... and a training step
        ...     if (evaluation := monitor.step(step)) is not None:
        ...         print(evaluation.step, evaluation.fallen)
        2 0
        4 0
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Tensor,
        *,
        every: int = 500,
        layer: str | int | None = None,
        extract: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 64,
        folder: str | PathLike[str] | None = None,
        keep: int = 3,
        save: Callable[[Path], None] | None = None,
        patience: int = 3,
        noise_factor: float = 2.0,
        replicates: int = 8,
        start: int = 0,
        early_stop: bool = False,
        dim_weight: float | str = 1.0,
        variant: str = "evaluation",
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(probe, Tensor) or probe.ndim != 4 or probe.shape[0] < 4:
            given = tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
            raise ValueError(f"probe must be images (P, C, H, W) with P >= 4, got {given}.")
        counts = {"every": every, "batch_size": batch_size, "keep": keep, "patience": patience}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")
        if replicates < 3:
            raise ValueError(f"replicates must be >= 3, got {replicates}.")
        if not noise_factor >= 0:
            raise ValueError(f"noise_factor must be >= 0, got {noise_factor}.")
        if isinstance(dim_weight, str) and dim_weight != "std":
            raise ValueError(f"dim_weight must be a number or 'std', got {dim_weight!r}.")
        if extract is not None and layer is not None:
            raise ValueError("give layer or extract, not both.")
        # The function that takes the options checks them: now, not after the first 500 steps.
        dse_components(torch.zeros(1, 1, 1), variant, generator=torch.Generator(), **options)
        self.model = model
        self.probe = probe.detach().cpu()
        self.every = every
        self.layer = layer
        self.extract = extract
        self.batch_size = batch_size
        self.folder = None if folder is None else Path(folder)
        self.keep = keep
        self.save = save
        self.patience = patience
        self.noise_factor = noise_factor
        self.replicates = replicates
        self.start = start
        self.early_stop = early_stop
        self.dim_weight = dim_weight
        self.variant = variant
        self.seed = seed
        self.options = options
        self.history: list[Evaluation] = []
        self.degraded = False
        self.should_stop = False
        if extract is None:  # a layer that does not exist is an error now
            DenseFeatures(model, layer).remove()

    # ------------------------------------------------------------------ measuring

    def step(self, step: int) -> Evaluation | None:
        """Evaluates if it is time.

        Args:
            step: Number of optimizer steps done.

        Returns:
            The evaluation, None between two of them.
        """
        return self.evaluate(step) if step % self.every == 0 else None

    def evaluate(self, step: int) -> Evaluation:
        """Measures DSE of the probe batch now.

        Args:
            step: Number of optimizer steps done; above that of the last evaluation.

        Returns:
            The evaluation.

        Raises:
            ValueError: If ``step`` is not above the last one.
        """
        if self.history and step <= self.history[-1].step:
            raise ValueError(
                f"step must be above that of the last evaluation, {self.history[-1].step}, "
                f"got {step}."
            )
        features = self._features()
        self.history.append(_on_rank_0(lambda: self._measure(step, features)))
        self._rescore()
        self._keep_best()
        self._judge()
        if self.folder is not None and _rank() == 0:
            save_text(self.folder / "history.csv", self.csv())
            save_text(self.folder / "history.json", self.json())
        return self.history[-1]

    @torch.no_grad()
    def _features(self) -> Tensor:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        gpus = [device] if device.type == "cuda" else []
        with _evaluating(self.model), torch.random.fork_rng(gpus, device_type="cuda"):
            torch.manual_seed(self.seed)  # masks, if the model draws any
            parts = []
            hook = None if self.extract else DenseFeatures(self.model, self.layer)
            # The wrapper's own forward would synchronize buffers, or be compiled for training.
            network = unwrap(self.model)
            try:
                for images in self.probe.split(self.batch_size):
                    images = images.to(device)
                    if self.extract is not None:
                        parts.append(self.extract(images))
                    else:
                        assert hook is not None
                        network(images)
                        parts.append(hook.take())
            finally:
                if hook is not None:
                    hook.remove()
        return torch.cat(parts)

    def _measure(self, step: int, features: Tensor) -> Evaluation:
        whole = self._components(features, self.seed)
        count = features.shape[0]
        generator = torch.Generator().manual_seed(self.seed)
        replicates = []
        for index in range(self.replicates):
            half = torch.randperm(count, generator=generator)[: count // 2].sort().values
            part = self._components(features[half.to(features.device)], self.seed + 1 + index)
            replicates.append((part.class_relevance, part.m_dim))
        return replace(whole, step=step, replicates=tuple(replicates))

    def _components(self, features: Tensor, seed: int) -> Evaluation:
        generator = torch.Generator().manual_seed(seed)
        c = dse_components(features, self.variant, generator=generator, **self.options)
        return Evaluation(
            step=0,
            m_inter=float(c.m_inter),
            m_intra_image=float(c.m_intra_image),
            m_intra_batch=float(c.m_intra_batch),
            m_dim=float(c.m_dim),
            avg_norm=float(c.avg_norm),
        )

    # ------------------------------------------------------------------ judging

    @property
    def current_dim_weight(self) -> float:
        """λ that the scores are computed with."""
        if not isinstance(self.dim_weight, str):
            return self.dim_weight
        finite = [e for e in self.history if math.isfinite(e.class_relevance + e.m_dim)]
        if len(finite) < 3 or len({e.m_dim for e in finite}) < 2:
            return 1.0
        return dse_lambda([e.class_relevance for e in finite], [e.m_dim for e in finite])

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the highest DSE; None before the first that counts."""
        return next(iter(self._ranked()), None)

    def _rescore(self) -> None:
        """Scores, drops and noises of all evaluations, with the λ of now."""
        weight = self.current_dim_weight
        peak: Evaluation | None = None
        fallen = 0
        for i, e in enumerate(self.history):
            e = replace(e, score=e.class_relevance + weight * e.m_dim, drop=0.0, noise=0.0)
            if e.step < self.start:
                e = replace(e, fallen=0)
            elif not math.isfinite(e.score):
                fallen += 1
                e = replace(e, drop=math.nan, noise=math.nan, fallen=fallen)
            elif peak is None or e.score >= peak.score:
                peak, fallen = e, 0
                e = replace(e, fallen=0)
            else:
                drop, noise = peak.score - e.score, _noise(peak, e, weight)
                fallen = fallen + 1 if drop > self.noise_factor * noise else 0
                e = replace(e, drop=drop, noise=noise, fallen=fallen)
            self.history[i] = e

    def _judge(self) -> None:
        now = self.history[-1]
        degraded = now.fallen >= self.patience
        if degraded and not self.degraded and _rank() == 0:
            warnings.warn(self._message(now), DenseDegradationWarning, stacklevel=4)
        self.degraded = degraded
        self.should_stop = self.should_stop or (degraded and self.early_stop)

    def _message(self, now: Evaluation) -> str:
        best = self.best
        if best is None or not math.isfinite(now.score):
            return f"the dense features of the probe batch are not finite at step {now.step}."
        kept = [e.checkpoint for e in self._ranked() if e.checkpoint is not None]
        return (
            f"dense features may be degrading: DSE of the probe batch is {now.score:.4f} at step "
            f"{now.step}, {now.drop:.4f} ± {now.noise:.4f} below its peak at step {best.step}, for "
            f"{now.fallen} evaluations in a row."
            + (f" Best checkpoints kept: {', '.join(kept)}." if kept else "")
        )

    # ------------------------------------------------------------------ checkpoints

    def _ranked(self) -> list[Evaluation]:
        """Evaluations that count, best first; of equal ones the earlier."""
        counted = [e for e in self.history if e.step >= self.start and math.isfinite(e.score)]
        return sorted(counted, key=lambda e: -e.score)

    def _keep_best(self) -> None:
        if self.folder is None:
            return
        now = self.history[-1]
        # What was pruned is gone, whatever a later λ makes of its score.
        there = [e for e in self._ranked() if e.step == now.step or e.checkpoint is not None]
        best = {e.step for e in there[: self.keep]}
        if now.step in best:
            name = f"dse-step-{now.step:08d}.pt"
            self._save(self.folder / name)
            self.history[-1] = replace(now, checkpoint=name)
        for i, e in enumerate(self.history):
            if e.checkpoint is not None and e.step not in best:
                if _rank() == 0:
                    (self.folder / e.checkpoint).unlink(missing_ok=True)
                self.history[i] = replace(e, checkpoint=None)

    def _save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.save is not None:
            self.save(path)
            return
        state = _state_dict(self.model)
        if _rank() == 0:
            with replacing(path) as temporary:
                torch.save(state, temporary)

    # ------------------------------------------------------------------ history

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values only."""
        return {
            "history": [{**vars(e), "replicates": [list(r) for r in e.replicates]}
                        for e in self.history],
            "degraded": self.degraded,
            "should_stop": self.should_stop,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` was called.

        Checkpoints in ``folder`` of later steps are removed, since these steps will be done again;
        a checkpoint that has been pruned since is no longer listed.

        Args:
            state: Result of :meth:`state_dict`.
        """
        self.history = [
            Evaluation(**{**e, "replicates": tuple((r, d) for r, d in e["replicates"])})
            for e in state["history"]
        ]
        self.degraded = bool(state["degraded"])
        self.should_stop = bool(state["should_stop"])
        if self.folder is None:
            return
        known = {e.checkpoint for e in self.history}
        for path in sorted(self.folder.glob("dse-step-*.pt")):
            if path.name not in known and _rank() == 0:
                path.unlink(missing_ok=True)
        self.history = [
            e if e.checkpoint is None or (self.folder / e.checkpoint).is_file()
            else replace(e, checkpoint=None)
            for e in self.history
        ]  # fmt: skip

    def csv(self) -> str:
        """The history as CSV, one line an evaluation."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for e in self.history:
            row = [getattr(e, name) for name in _COLUMNS]
            writer.writerow("" if v is None or v != v else v for v in row)
        return text.getvalue()

    def json(self) -> str:
        """The history as JSON, with λ and the best step; values that are not finite are null."""
        rows = [
            {name: _finite_or_none(getattr(e, name)) for name in _COLUMNS} for e in self.history
        ]
        best = self.best
        content = {
            "dim_weight": self.current_dim_weight,
            "best_step": None if best is None else best.step,
            "evaluations": rows,
        }
        return json.dumps(content, indent=1) + "\n"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws DSE over the steps, with its noise, its peak and the checkpoints that are kept.

        Args:
            ax: Axes to draw on; those of a new figure by default.

        Returns:
            The axes.

        Raises:
            ValueError: If nothing has been measured yet.
        """
        import matplotlib
        from matplotlib.figure import Figure

        from dse_ext.report.style import MUTED, PURPLE, RC, RED

        if not self.history:
            raise ValueError("there is nothing to plot before the first evaluation.")
        with matplotlib.rc_context(RC):
            if ax is None:
                ax = Figure(figsize=(6.4, 3.6), layout="constrained").subplots()
            steps = [e.step for e in self.history]
            noise = [self.noise_factor * e.noise for e in self.history]
            ax.errorbar(
                steps, [e.score for e in self.history], yerr=noise, fmt="o-", color=PURPLE,
                ecolor=MUTED, capsize=2, label=f"DSE ± {self.noise_factor:g} standard errors",
            )  # fmt: skip
            kept = [e for e in self.history if e.checkpoint is not None]
            if kept:
                ax.plot(
                    [e.step for e in kept], [e.score for e in kept], "o", markersize=11,
                    markerfacecolor="none", markeredgecolor=RED, label="kept",
                )  # fmt: skip
            best = self.best
            if best is not None:
                ax.axhline(best.score, color=MUTED, linewidth=0.8, linestyle=":")
            ax.set(xlabel="step", ylabel="DSE", title="DSE of the probe batch")
            ax.legend(fontsize=8)
        return ax


def _noise(peak: Evaluation, now: Evaluation, weight: float) -> float:
    """Standard error of the difference of two evaluations on the same halves."""
    differences = [
        (a + weight * b) - (c + weight * d)
        for (a, b), (c, d) in zip(peak.replicates, now.replicates, strict=True)
    ]
    return statistics.stdev(differences) if all(map(math.isfinite, differences)) else math.inf


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module returns to the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _state_dict(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers under the names of the unwrapped model, gathered if sharded."""
    if _world() == 1:
        return unwrap(model).state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(unwrap(model), options=options)


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if _world() > 1 else 0


def _on_rank_0(measure: Callable[[], Evaluation]) -> Evaluation:
    """Rank 0's evaluation on all ranks; where rank 0 fails, all do."""
    if _world() == 1:
        return measure()
    import torch.distributed as dist

    shared: list[Evaluation | str | None] = [None]
    failure: Exception | None = None
    if _rank() == 0:
        try:
            shared = [measure()]
        except Exception as error:  # told to the other ranks first, which would wait
            failure, shared = error, [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(shared, src=0)
    if failure is not None:
        raise failure
    if not isinstance(shared[0], Evaluation):
        raise RuntimeError(f"rank 0 could not measure the probe batch: {shared[0]}")
    return shared[0]


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
