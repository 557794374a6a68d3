"""Label-free baselines that look at the spectrum of the features: RankMe, α-ReQ and LiDAR.

They are what DSE is compared with. All three measure a spectrum and nothing else: no clusters, no
positions. Each follows the definition of its own paper, so that a figure is comparable with the
figures published under that name.

Everything below is computed in double precision from the features as they are given, because all
three depend on the small end of the spectrum, where single precision has nothing left but
rounding. None of them is differentiable here; `dse_ext.effective_rank` is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["RankMeAccumulator", "alpha_req", "lidar", "rankme"]


@torch.no_grad()
def rankme(z: Tensor, eps: float = 1e-7) -> Tensor:
    r"""RankMe: the effective rank of the features.

    .. math::
        \mathrm{RankMe}(Z) = \exp\Big(-\sum_{k=1}^{\min(M, d)} p_k \log p_k\Big), \qquad
        p_k = \frac{\sigma_k(Z)}{\lVert\sigma(Z)\rVert_1} + \varepsilon

    σ are the singular values of the features as they are: neither centred nor normalized.

    Source: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained
    Self-Supervised Representations by Their Rank", ICML 2023, https://arxiv.org/abs/2210.02885.

    Args:
        z:
            Features, either `(M, d)`, one row per sample, or `(B, N, d)`, dense features of B
            images at N positions. Dense features are taken as `B * N` rows, which is the dense
            RankMe (RankMe†) that DSE is compared with. For the image-level RankMe pass pooled
            features, `z.mean(dim=1)`.
        eps:
            The ε of the definition. Must be >= 0; 0 gives the effective rank, with 0 · log 0 = 0.

    Returns:
        0-dim tensor on the device of `z`, float64 for float64 input and float32 otherwise. Between
        1 and min(M, d), up to ε. 0 where every feature is 0; NaN where a feature is not finite.

    Raises:
        ValueError: If `z` is not a floating point tensor of two or three dimensions without an
            empty axis, or `eps` is negative.

    Examples:
        >>> import torch, dse_ext
        >>> dse_ext.rankme(torch.eye(5))
        tensor(5.0000)
    """
    rows = _rows("z", z)
    _at_least_zero("eps", eps)
    if not bool(rows.isfinite().all()):
        return _result(math.nan, z)
    return _result(_effective_rank(_singular_values(rows), eps), z)


class RankMeAccumulator:
    """RankMe of features that come in batches, without keeping them.

    What is kept is the second moment of the rows in double precision, `d * d` values. Its
    eigenvalues give the singular values to about 1e-8 of the largest one, which is below the ε of
    the definition: the result is that of `rankme` on all rows to about 1e-6, and to 1e-3 where the
    features have collapsed to very few directions.

    Args:
        eps:
            The ε of the definition. Must be >= 0.

    Raises:
        ValueError: If `eps` is negative.

    Examples:
        >>> import torch
        >>> from dse_ext.spectrum import RankMeAccumulator
        >>> rank = RankMeAccumulator()
        >>> for _ in range(3):
        ...     rank.update(torch.eye(5))
        >>> rank.compute()
        tensor(5.0000, dtype=torch.float64)
    """

    def __init__(self, eps: float = 1e-7) -> None:
        _at_least_zero("eps", eps)
        self.eps = eps
        self._moment: Tensor | None = None
        self._rows = 0

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        """Adds features.

        Args:
            z:
                `(M, d)` or `(B, N, d)`, d always the same, on one device.

        Raises:
            ValueError: If it is no such tensor.
        """
        rows = _rows("z", z).to(torch.float64)
        if self._moment is None:
            self._moment = rows.new_zeros(rows.shape[1], rows.shape[1])
        elif rows.shape[1] != len(self._moment):
            raise ValueError(f"z must have {len(self._moment)} features, got {rows.shape[1]}.")
        self._moment.addmm_(rows.mT, rows)
        self._rows += len(rows)

    @torch.no_grad()
    def compute(self) -> Tensor:
        """RankMe of all rows so far.

        Returns:
            0-dim float64 tensor; NaN where a feature was not finite.

        Raises:
            RuntimeError: If there was no row.
        """
        if self._moment is None:
            raise RuntimeError("RankMeAccumulator.compute() needs at least one update().")
        if not bool(self._moment.isfinite().all()):
            return self._moment.new_full((), math.nan)
        squares = torch.linalg.eigvalsh(self._moment)[-self._rows :]
        return _effective_rank(squares.clamp(min=0).sqrt(), self.eps)


@torch.no_grad()
def alpha_req(z: Tensor, fit_range: tuple[int, int] | None = None) -> Tensor:
    r"""α-ReQ: how fast the eigenvalues of the feature covariance decay.

    .. math::
        \lambda_k \propto k^{-\alpha}, \qquad
        (\alpha, c) = \operatorname*{arg\,min}_{\alpha, c}
        \sum_k \big(\log \lambda_k + \alpha \log k - c\big)^2

    λ are the eigenvalues of the covariance of the (centred) features in descending order, k = 1 is
    the largest. A large α is a fast decay: few directions carry the variance. The source reports
    that good representations have α close to 1, so neither end of the range is best.

    Source: Agrawal et al., "α-ReQ: Assessing Representation Quality in Self-Supervised Learning
    by measuring eigenspectrum decay", NeurIPS 2022.

    Args:
        z:
            Features, `(M, d)` or `(B, N, d)`; the latter are taken as `B * N` rows.
        fit_range:
            The first and the last k of the fit, 1-based and inclusive. A power law often holds in
            the middle of the spectrum only. Default: all. Either way the eigenvalues that are
            zero to double precision are left out, since they have no logarithm.

    Returns:
        α, a 0-dim tensor on the device of `z`, float64 for float64 input and float32 otherwise.
        NaN where a feature is not finite, and where fewer than two eigenvalues are left to fit a
        slope to (rows that are all equal, or that lie on one line exactly).

    Raises:
        ValueError: If `z` is not a floating point tensor of two or three dimensions without an
            empty axis, or `fit_range` is not `1 <= first < last <= min(M, d)`.

    Examples:
        >>> import torch, dse_ext
        >>> k = torch.arange(1, 9, dtype=torch.float64)
        >>> z = torch.cat([torch.diag(1 / k), -torch.diag(1 / k)])  # Variances k^-2 / 8.
        >>> dse_ext.alpha_req(z)
        tensor(2.0000, dtype=torch.float64)
    """
    rows = _rows("z", z)
    count = min(rows.shape)
    first, last = (1, count) if fit_range is None else fit_range
    if fit_range is not None and not 1 <= first < last <= count:
        raise ValueError(
            "fit_range must be (first, last) with 1 <= first < last <= min(number of rows, "
            f"dimension) = {count}, got {fit_range}."
        )
    if not bool(rows.isfinite().all()):
        return _result(math.nan, z)

    sigma = _singular_values(rows, center=True)
    # What centring and decomposing in double precision leave of a zero.
    scale = torch.maximum(sigma[0], rows.abs().amax().to(torch.float64))
    noise = max(rows.shape) * torch.finfo(torch.float64).eps * scale
    last = min(last, int((sigma > noise).sum()))
    if last - first < 1:
        return _result(math.nan, z)
    log_k = torch.arange(first, last + 1, dtype=torch.float64, device=z.device).log()
    log_lambda = 2 * sigma[first - 1 : last].log()
    log_k = log_k - log_k.mean()
    slope = (log_k * (log_lambda - log_lambda.mean())).sum() / (log_k * log_k).sum()
    return _result(0.0 - slope, z)


@torch.no_grad()
def lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> Tensor:
    r"""LiDAR: the effective rank of the linear discriminant analysis (LDA) of the SSL task.

    Every clean sample is a surrogate class, its views are the members of the class.

    .. math::
        \Sigma_b = \operatorname{E}_i\big[(\mu_i - \mu)(\mu_i - \mu)^\top\big], \qquad
        \Sigma_w = \operatorname{E}_{i,j}\big[(z_{ij} - \mu_i)(z_{ij} - \mu_i)^\top\big]
                   + \delta I_d

    .. math::
        \mathrm{LiDAR} = \exp\Big(-\sum_{k=1}^{d} p_k \log p_k\Big), \qquad
        p_k = \frac{\lambda_k}{\lVert\lambda\rVert_1} + \varepsilon, \qquad
        \lambda = \operatorname{eig}\big(\Sigma_w^{-1/2}\, \Sigma_b\, \Sigma_w^{-1/2}\big)

    μ_i is the mean of the views of sample i, μ the mean of the μ_i. The expectations are plain
    means over n samples and over n · q views.

    Source: Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL
    Architectures", ICLR 2024, https://arxiv.org/abs/2312.04000.

    Args:
        views:
            Features of shape `(n, q, d)`: n clean samples, q views (augmentations) of each,
            d features.
        delta:
            The δ that makes Σ_w invertible, in squared units of the features: the result is not
            invariant to their scale. Must be > 0. Implementations differ in it, so name it with
            the figure.
        eps:
            The ε of the definition. Must be >= 0.

    Returns:
        0-dim tensor on the device of `views`, float64 for float64 input and float32 otherwise.
        Between 1 and min(n − 1, d), up to ε. 0 where all samples have the same mean (n = 1
        included); NaN where a feature is not finite.

    Raises:
        ValueError: If `views` is not a floating point tensor of three dimensions without an
            empty axis, `delta` is not positive or `eps` is negative.

    Examples:
        >>> import torch, dse_ext
        >>> samples = torch.eye(4).unsqueeze(1)
        >>> noise = 0.1 * torch.randn(4, 8, 4)
        >>> bool(dse_ext.lidar(samples + noise) < 3.01)  # Four classes span three directions.
        True
    """
    _check_features("views", views, {3: "(n, q, d): samples, views, features"})
    if not delta > 0:
        raise ValueError(f"delta must be > 0, got {delta}.")
    _at_least_zero("eps", eps)
    if not bool(views.isfinite().all()):
        return _result(math.nan, views)

    n, q, d = views.shape
    x = views.to(torch.float64)
    means = x.mean(dim=1)
    within = (x - means.unsqueeze(1)).reshape(n * q, d)
    between = (means - means.mean(dim=0)) / math.sqrt(n)
    variances, axes = torch.linalg.eigh(within.mT @ within / (n * q))
    # With Σ_b = BᵀB, the eigenvalues of Σ_w^-½ Σ_b Σ_w^-½ are the squared singular values of
    # B Σ_w^-½, which keeps the small ones accurate.
    whitened = (between @ axes) / (variances.clamp(min=0) + delta).sqrt()
    sigma = torch.linalg.svdvals(whitened)
    # Means that differ by rounding alone would otherwise be normalized into a spectrum of noise.
    floor = n * torch.finfo(torch.float64).eps * means.abs().amax() / math.sqrt(delta)
    sigma = torch.where(sigma > floor, sigma, 0)
    # The remaining eigenvalues of the d x d matrix are zero; the definition adds ε to them too.
    values = torch.nn.functional.pad(sigma.square(), (0, d - sigma.numel()))
    return _result(_effective_rank(values, eps), views)


def _effective_rank(values: Tensor, eps: float) -> Tensor:
    """The exponential of the entropy of the values, normalized to sum 1 and shifted by eps."""
    total = values.sum()
    if not bool(total > 0):
        return torch.zeros_like(total)
    p = values / total + eps
    return torch.exp(torch.special.entr(p).sum())


def _singular_values(rows: Tensor, center: bool = False) -> Tensor:
    """Singular values in descending order, in double precision.

    Tall matrices are first reduced to a triangle of d rows by the QR decomposition of one block of
    rows after the other. That has the accuracy of a decomposition of the whole matrix (a Gram
    matrix loses half of the digits), and the double-precision copy is never more than a block.
    """
    mean = rows.mean(dim=0, dtype=torch.float64) if center else torch.zeros((), device=rows.device)
    block = max(4 * rows.shape[1], 4096)
    first, *others = torch.split(rows, block)
    reduced = first.to(torch.float64) - mean
    for part in others:
        stacked = torch.cat([reduced, part.to(torch.float64) - mean])
        reduced = torch.linalg.qr(stacked, mode="r").R
    sigma: Tensor = torch.linalg.svdvals(reduced)
    return sigma


def _rows(name: str, z: Tensor) -> Tensor:
    """The features as a matrix of one row per sample or position."""
    _check_features(name, z, {2: "(M, d)", 3: "(B, N, d)"})
    return z.reshape(-1, z.shape[-1])


def _check_features(name: str, value: object, shapes: dict[int, str]) -> None:
    """Raises unless the value is a non-empty float tensor of one of the ranks in `shapes`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a floating point tensor, got {type(value).__name__}.")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {value.dtype}.")
    if value.ndim not in shapes:
        raise ValueError(
            f"{name} must have shape {' or '.join(shapes.values())}, got {tuple(value.shape)}."
        )
    if 0 in value.shape:
        raise ValueError(f"{name} must not have an empty axis, got {tuple(value.shape)}.")


def _at_least_zero(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}.")


def _result(value: Tensor | float, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.as_tensor(value, dtype=dtype, device=like.device)
