"""Facts about the build of dse_ext, and its operators on NumPy arrays."""

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    version: str
    compiler: str
    compiler_version: str
    cxx_standard: str
    cxx_flags: str
    torch_abi: str
    torch_version: str
    cuda: bool
    cuda_compiler: str | None
    cuda_archs: list[str]
    cuda_reason: str | None

def build_info() -> BuildInfo: ...
def dse_components(
    array: NDArray[np.floating[Any]],
    *,
    variant: str = "regularizer",
    local_clusters: int = 3,
    global_clusters: int = 24,
    group_images: int | None = None,
    normalize: bool = True,
    max_kmeans_iters: int = 20,
    tol: float = 1e-4,
    seed: int = 0,
    local_labels: NDArray[np.integer[Any]] | None = None,
    global_labels: NDArray[np.integer[Any]] | None = None,
    global_centroids: NDArray[np.floating[Any]] | None = None,
) -> dict[str, Any]: ...
def kmeans(
    array: NDArray[np.floating[Any]],
    k: int,
    *,
    max_iters: int = 20,
    tol: float = 1e-4,
    seed: int = 0,
) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64], NDArray[np.floating[Any]]]: ...
def cluster_nuclear_norms(
    array: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], k: int
) -> NDArray[np.floating[Any]]: ...
def effective_rank(
    array: NDArray[np.floating[Any]], *, center: bool = False
) -> NDArray[np.floating[Any]] | np.floating[Any]: ...
