"""The DSE regularizer on a layer of a model whose training step somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dse_ext.hooks import DenseFeatures, unwrap
from dse_ext.regularizer import DSERegularizer

__all__ = ["FeaturePenalty", "submodule"]


class FeaturePenalty:
    """Collects the dense features of a training step and gives the term to add to its loss.

    Args:
        model:
            The model.
        regularizer:
            The regularizer, or its weight (the paper trains with 0.001).
        layer:
            Layer whose features are regularized, see :class:`dse_ext.hooks.DenseFeatures`.
        views:
            How many calls of the layer in a step are regularized, the first ones: 2 for the two
            global views of DINO, whose local views follow. None: all of them. Calls without a
            gradient do not count. Over several views the mean is taken.

    Attributes:
        regularizer: The regularizer; its ``last`` has the components for a log.

    Examples:
        >>> import torch
        >>> from dse_ext.integrations import FeaturePenalty
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.ReLU())
        >>> penalty = FeaturePenalty(model, 0.001, layer="1")
        >>> with penalty.step():
        ...     loss = model(torch.rand(4, 3, 32, 32)).mean()  # somebody else's step
        ...     loss = loss + penalty.term()
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: DSERegularizer | float = 0.001,
        *,
        layer: str | int | None = None,
        views: int | None = None,
    ) -> None:
        if views is not None and views < 1:
            raise ValueError(f"views must be >= 1 or None, got {views}.")
        if not isinstance(regularizer, DSERegularizer):
            regularizer = DSERegularizer(weight=regularizer)
        self.regularizer = regularizer
        self.views = views
        self._features = DenseFeatures(model, layer, keep=None)

    @property
    def layer(self) -> str:
        """Name of the layer whose features are regularized."""
        return self._features.layer

    @contextmanager
    def step(self) -> Iterator[None]:
        """Begins a training step, and lets go of its features at the end."""
        self._features.clear()
        try:
            yield
        finally:
            self._features.clear()

    def term(self) -> Tensor:
        """Computes ``-weight * DSE`` of the features that the step has run so far.

        Raises:
            RuntimeError: If the layer has not run with gradients in this step.
        """
        calls = [z for z in self._features.calls if z.requires_grad][: self.views]
        if not calls:
            ran = len(self._features.calls)
            raise RuntimeError(
                f"layer {self.layer!r} has not run with gradients in this step ({ran} calls "
                "without): is it part of the network that is trained?"
            )
        return torch.stack([self.regularizer(z) for z in calls]).mean()

    def logs(self, prefix: str = "dse/") -> dict[str, Tensor]:
        """The components of the last call by name, and their score; empty before it."""
        last = self.regularizer.last
        if last is None:
            return {}
        names = ("m_inter", "m_intra_image", "m_intra_batch", "m_dim")
        values = {prefix + name: getattr(last, name) for name in names}
        values[prefix + "score"] = last.score(self.regularizer.dim_weight)
        return values

    def remove(self) -> None:
        """Takes the hook out of the model."""
        self._features.clear()
        self._features.remove()


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The part of a model that is meant by a dotted name; the model itself by ``""``.

    Raises:
        ValueError: If there is no such part; the message lists what there is.
    """
    model = unwrap(model)
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ", ".join(repr(child) for child, _ in model.named_children())
        raise ValueError(
            f"module must be the name of a part of {type(model).__name__}, got {name!r}; it "
            f"consists of {children}."
        ) from None
