"""Everything that can be measured, by name."""

from __future__ import annotations

from dse_ext.bench.case import Case
from dse_ext.bench.clustering import KMEANS
from dse_ext.bench.operation import OURS, Operation
from dse_ext.bench.regularizers import DSE_COMPONENTS
from dse_ext.bench.spectra import CLUSTER_NUCLEAR_NORMS, EFFECTIVE_RANK

__all__ = ["OPERATIONS", "contestants"]

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (DSE_COMPONENTS, KMEANS, CLUSTER_NUCLEAR_NORMS, EFFECTIVE_RANK)
}


def contestants(case: Case, *, compiled: bool = False) -> tuple[list[str], dict[str, str]]:
    """Who can run a case, and who cannot.

    Args:
        case: The case.
        compiled: Whether those that compile take part; without it they are not even named.

    Returns:
        Keys of implementations in the order of a round, ours first, and reasons by key.
    """
    able, unable = [OURS], {}
    for key, implementation in OPERATIONS[case.operation].implementations.items():
        if key == OURS or (implementation.compiled and not compiled):
            continue
        reason = implementation.obstacle(case)
        if reason is None:
            able.append(key)
        else:
            unable[key] = reason
    return able, unable
