"""Feature clouds and clusterings for the tests; everything from a seed, float64 on the CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def random(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Isotropic: every direction carries the same."""
    return normal(b, n, d, seed=seed)


def clustered(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Five well separated kinds of positions."""
    centers = 3 * normal(5, d, seed=seed)
    kinds = torch.randint(5, (b, n), generator=generator(seed + 1))
    return centers[kinds] + 0.3 * normal(b, n, d, seed=seed + 2)


def low_rank(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Four strong directions over a floor of one percent."""
    signal = normal(b, n, 4, seed=seed) @ normal(4, d, seed=seed + 1)
    return signal + 0.01 * normal(b, n, d, seed=seed + 2)


def nearly_collapsed(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """All rows are one row, up to a thousandth of its length."""
    common = normal(d, seed=seed)
    spread = normal(b, n, d, seed=seed + 1) / d**0.5
    return common + 1e-3 * common.norm() * spread


def rank_collapsed(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Rank two exactly, before the rounding to the test's dtype."""
    return normal(b, n, 2, seed=seed) @ normal(2, d, seed=seed + 1)


CLOUDS = {
    "random": random,
    "clustered": clustered,
    "low_rank": low_rank,
    "nearly_collapsed": nearly_collapsed,
    "rank_collapsed": rank_collapsed,
}
COLLAPSED = ("nearly_collapsed", "rank_collapsed")


def random_labels(b: int, n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randint(k, (b, n), generator=generator(seed))


def orthogonal(d: int, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(d, d, seed=seed))
    return q


@functools.cache
def photographs(size: int = 64) -> Tensor:
    """(6, 3, size, size) in [0, 1]: photographs that scikit-image and scikit-learn install."""
    import skimage.data
    import torch.nn.functional as F
    from sklearn.datasets import load_sample_image

    images = [
        skimage.data.astronaut(),
        skimage.data.coffee(),
        skimage.data.chelsea(),
        skimage.data.rocket(),
        load_sample_image("china.jpg"),
        load_sample_image("flower.jpg"),
    ]
    resized = []
    for image in images:
        side = min(image.shape[:2])
        square = torch.from_numpy(image[:side, :side].copy()).permute(2, 0, 1)[None].float() / 255
        resized.append(F.interpolate(square, (size, size), mode="bilinear", antialias=True))
    return torch.cat(resized)


@functools.cache
def vit_features() -> Tensor:
    """(6, 36, 192) patch tokens of a timm ViT with seeded random weights."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=96).eval()
    with torch.no_grad():
        return model.forward_features(photographs(96))[:, 1:].double()


@functools.cache
def resnet_features() -> Tensor:
    """(6, 36, 256) positions of the third stage of a timm ResNet with seeded random weights."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, features_only=True).eval()
    with torch.no_grad():
        return model(photographs(96))[3].flatten(2).transpose(1, 2).double()
