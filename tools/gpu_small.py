"""Every CUDA operator once on small inputs: what `make gpu-check` runs under compute-sanitizer.

The shapes take every path: the fused image kernel and the kernels for clusters of any size, both
sides of the Gram matrices, effective ranks by one block and by shifted inverses, groups cut short.
"""

from __future__ import annotations

import argparse

import torch

import dse_ext

SHAPES = ((5, 20, 24), (2, 260, 12), (3, 60, 140), (9, 8, 5))


def main() -> None:
    """Runs everything and checks that the results are finite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    options = parser.parse_args()
    device = torch.device(options.device)
    calls = 0
    for shape in SHAPES[: options.shapes]:
        for dtype in (torch.bfloat16, torch.float32):
            for variant in ("regularizer", "evaluation", "paper"):
                z = torch.randn(shape, device=device).to(dtype).requires_grad_()
                c = dse_ext.dse_components(z, variant=variant)
                c.score().backward()
                assert z.grad is not None
                assert bool(torch.stack(c[:5]).isfinite().all() & z.grad.isfinite().all()), shape
                calls += 1
            x = torch.randn(shape, device=device).to(dtype).requires_grad_()
            labels = dse_ext.kmeans(x, 3).labels
            norms = dse_ext.cluster_nuclear_norms(x, labels, 3)
            (norms.sum() + dse_ext.effective_rank(x).sum()).backward()
            assert x.grad is not None
            assert bool(x.grad.isfinite().all()), shape
            calls += 3
    print(f"{calls} calls on {device}, all finite")


if __name__ == "__main__":
    main()
