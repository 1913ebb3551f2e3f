"""Where the chance of a training stands: every random generator it draws from, to be kept and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from bundle.errors import InputError


def random_generators(root: Any) -> list[np.random.RandomState]:
    """Every NumPy generator that the (nested) transforms of ``root`` draw from, each once, in a fixed order."""
    found: dict[int, np.random.RandomState] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, np.random.RandomState):
            found[id(thing)] = thing
        elif isinstance(thing, Mapping):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, nn.Module, torch.Tensor)):
            visit(vars(thing))

    visit(root)
    return list(found.values())


class RandomStates:
    """The states of all random generators of a training: Python's, NumPy's, torch's, and those of its transforms.

    Args:
        transforms: whatever holds the random transforms.
    """

    def __init__(self, transforms: Any = ()) -> None:
        self.transforms = transforms

    def state_dict(self) -> dict[str, Any]:
        """Only tensors and plain numbers, so that it loads with ``weights_only``."""
        return {
            "python": random.getstate(),
            "numpy": _numpy_state(np.random.mtrand._rand),
            "transforms": [_numpy_state(generator) for generator in random_generators(self.transforms)],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises: InputError: of other transforms."""
        generators = random_generators(self.transforms)
        if len(generators) != len(state["transforms"]):
            raise InputError("the checkpoint is of a training with other random transforms; start anew")
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        for generator, saved in zip([np.random.mtrand._rand, *generators], [state["numpy"], *state["transforms"]]):
            generator.set_state((saved[0], saved[1].numpy().astype(np.uint32), *saved[2:]))
        torch.set_rng_state(state["torch"].cpu())
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _numpy_state(generator: np.random.RandomState) -> list[Any]:
    name, keys, *rest = generator.get_state(legacy=True)
    return [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(rest[0]), int(rest[1]), float(rest[2])]
