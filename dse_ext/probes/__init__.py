"""Probes: the true quality of dense features, measured with labels."""

from dse_ext.probes.linear import LinearProbe, ProbeScore

__all__ = ["LinearProbe", "ProbeScore"]
