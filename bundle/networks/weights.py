"""Weights on disk: what they are of is kept with them."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bundle.data.datalist import CHAIN
from bundle.data.files import atomic_path
from bundle.errors import InputError


def write_torch(path: str | Path, content: Any) -> None:
    """`torch.save`, atomically; torch's own writer has no word for a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def save_weights(
    network: nn.Module, path: str | Path, about: Mapping[str, Any] | None = None, half: bool = False
) -> None:
    """Write a network's weights: a flat state dict, as MONAI expects it, with facts in the metadata that torch keeps
    beside every state dict.

    Args:
        network: whose.
        path: of the file.
        about: facts of plain numbers and text, such as the contrast; the version of the chain comes to them.
        half: parameters of 16 bit instead of 32; not the buffers, since a batch norm's variance can be beyond 16 bit.
    """
    weights = network.state_dict()
    halved = {name for name, _ in network.named_parameters()} if half else set()
    flat = OrderedDict((k, value.cpu().half() if k in halved else value.cpu()) for k, value in weights.items())
    known = dict(getattr(weights, "_metadata", {}))
    known[""] = {**known.get("", {}), **(about or {}), "chain": CHAIN}
    flat._metadata = known  # type: ignore[attr-defined]
    write_torch(path, flat)


def load_weights(network: Any, model_file: str | Path) -> dict[str, Any]:
    """Put a flat state dict into a network.

    Returns:
        the facts that `save_weights` was given (``about``).

    Raises:
        InputError: a file that is none, that of another network, or one that was trained on scans of another chain.
    """
    try:
        weights = torch.load(model_file, map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
    except Exception as error:  # torch has many for a file that is no model, or another's
        raise InputError(
            f"{model_file}: no weights of the configured {type(network).__name__}: damaged, of another network or "
            "grid, or more than numbers; take the configs that it was trained with, or train it again"
        ) from error
    facts: dict[str, Any] = getattr(weights, "_metadata", {}).get("", {})
    if facts.get("chain") != CHAIN:
        raise InputError(f"{model_file}: trained by an older version, on other intensities and slices; train it again")
    return facts
