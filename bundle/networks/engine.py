"""Networks that were compiled before."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.utils import optional_import
from torch import nn

from bundle.data.files import AUTO
from bundle.errors import InputError


def load_engine(path: str | Path) -> nn.Module:
    """A network that `trt_export` (or `ckpt_export`) has written. TensorRT's need the package torch_tensorrt.

    Raises:
        InputError: no such file, or one that cannot be loaded; no contrast was named.
    """
    if Path(path).stem.endswith(f"_{AUTO}_trt"):
        raise InputError("a compiled network is of one contrast: name it with --contrast")
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no compiled network; make it with: python -m monai.bundle trt_export (docs/README.md)"
        )
    optional_import("torch_tensorrt")  # registers what its engines need; plain TorchScript needs nothing
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise InputError(
            f"{path}: cannot be loaded here; TensorRT engines need torch_tensorrt and their GPU"
        ) from error
