"""The Dense representation Structure Estimator (DSE) as fast, differentiable torch operators.

``import dse_ext`` loads ``torch.ops.dse_ext.*`` and needs torch and NumPy alone. What builds on
other packages (``DSEMetric`` on torchmetrics; ``dse_ext.ssl``, ``dse_ext.data``,
``dse_ext.probes``) is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dse_ext._version import __version__
from dse_ext.functional import (
    DSEComponents,
    KMeansResult,
    cluster_nuclear_norms,
    dse_components,
    effective_rank,
    kmeans,
)
from dse_ext.regularizer import DSERegularizer
from dse_ext.selection import dse_lambda, select_checkpoints
from dse_ext.spectrum import alpha_req, lidar, rankme

if TYPE_CHECKING:
    from dse_ext.metric import DSEMetric

__all__ = [
    "DSEComponents",
    "DSEMetric",
    "DSERegularizer",
    "KMeansResult",
    "__version__",
    "alpha_req",
    "cluster_nuclear_norms",
    "dse_components",
    "dse_lambda",
    "effective_rank",
    "kmeans",
    "lidar",
    "rankme",
    "select_checkpoints",
]


def __getattr__(name: str) -> Any:
    if name == "DSEMetric":
        from dse_ext.metric import DSEMetric

        return DSEMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
