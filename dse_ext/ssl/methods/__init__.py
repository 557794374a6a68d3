"""Self-supervised methods by name."""

from dse_ext.ssl.config import ConfigError
from dse_ext.ssl.methods.barlowtwins import BarlowTwins
from dse_ext.ssl.methods.base import Method, MethodOutput
from dse_ext.ssl.methods.byol import BYOL
from dse_ext.ssl.methods.densecl import DenseCL
from dse_ext.ssl.methods.dino import DINO
from dse_ext.ssl.methods.esvit import EsViT
from dse_ext.ssl.methods.ibot import IBOT
from dse_ext.ssl.methods.ijepa import IJEPA
from dse_ext.ssl.methods.mae import MAE
from dse_ext.ssl.methods.mec import MEC
from dse_ext.ssl.methods.mocov3 import MoCoV3
from dse_ext.ssl.methods.mugs import Mugs
from dse_ext.ssl.methods.resa import ReSA
from dse_ext.ssl.methods.simsiam import SimSiam
from dse_ext.ssl.methods.swav import SwAV
from dse_ext.ssl.methods.vicreg import VICReg
from dse_ext.ssl.methods.vicregl import VICRegL

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        MoCoV3,
        DenseCL,
        BYOL,
        SimSiam,
        EsViT,
        MEC,
        VICRegL,
        DINO,
        IBOT,
        Mugs,
        MAE,
        IJEPA,
        SwAV,
        VICReg,
        BarlowTwins,
        ReSA,
    )
}
"""Every method that a run can be started with, in the order of the DSE paper."""


def find_method(name: str) -> type[Method]:
    """Returns a method by its name.

    Raises:
        ConfigError: If there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(sorted(METHODS))}, got {name!r}.")
    return METHODS[name]


__all__ = [
    "BYOL",
    "DINO",
    "IBOT",
    "IJEPA",
    "MAE",
    "MEC",
    "METHODS",
    "BarlowTwins",
    "DenseCL",
    "EsViT",
    "Method",
    "MethodOutput",
    "MoCoV3",
    "Mugs",
    "ReSA",
    "SimSiam",
    "SwAV",
    "VICReg",
    "VICRegL",
    "find_method",
]
