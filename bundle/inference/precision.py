"""The numbers that networks compute in."""

from __future__ import annotations

import torch

from bundle.errors import InputError


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """The context in which networks run: "float32", "bfloat16" or "auto", which is bfloat16 on processors and GPUs that
    compute in it, in half the time or less, and float32 on others.

    Raises:
        InputError: another precision.
    """
    kind = torch.device(device).type
    if precision not in ("auto", "float32", "bfloat16"):
        raise InputError(f"precision '{precision}' is unknown: use auto, float32 or bfloat16")
    enabled = precision == "bfloat16" or (precision == "auto" and _computes_in_bfloat16(kind))
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def _computes_in_bfloat16(kind: str) -> bool:
    """Torch runs bfloat16 everywhere, but on some by way of float32, which takes longer than float32 itself."""
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if kind != "cpu":
        return False
    ask = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch do not tell
    return ask is not None and any(ask().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
