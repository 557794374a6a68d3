"""Choice of the device."""

from __future__ import annotations

import torch

from dse_ext.ssl.config import ConfigError


def choose_device(name: str, needs_dse: bool = True) -> torch.device:
    """Turns the option ``device`` into a device that the run can use.

    Args:
        name: A torch device, or ``"auto"``: the GPU, if torch has one and the installed dse-ext
            has kernels for it where they are needed, otherwise the CPU.
        needs_dse: Whether DSE is computed on the device.

    Returns:
        The device.

    Raises:
        ConfigError: If there is no such device, or dse-ext cannot run on it.
    """
    if name == "auto":
        usable = torch.cuda.is_available() and (not needs_dse or _has_kernels("CUDA"))
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name} was asked for, but torch sees no GPU; use cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"device {name} was asked for, but torch sees {torch.cuda.device_count()} GPU(s)."
            )
        if needs_dse and not _has_kernels("CUDA"):
            raise ConfigError(
                f"device {name} was asked for, but the installed dse-ext has no CUDA kernels "
                "(see dse-ext info); use cpu."
            )
    return device


def _has_kernels(key: str) -> bool:
    import dse_ext  # noqa: F401  (registers the operators)

    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("dse_ext::dse_components", key))
