"""DSE in other people's trainers; each module needs the package that it is named after.

* :mod:`dse_ext.integrations.lightning`: callbacks for Lightning.
* :mod:`dse_ext.integrations.transformers`: a mixin and a callback for the Hugging Face Trainer.

What they share, and what a trainer of one's own can use: :class:`FeaturePenalty`.
"""

from __future__ import annotations

from dse_ext.integrations.penalty import FeaturePenalty

__all__ = ["FeaturePenalty"]
