"""A loss that is no number any more."""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Engine, Events
from monai.handlers import from_engine

from bundle.errors import InputError


class RequireFiniteLoss:
    """Handler: stop a training whose loss is NaN or infinite, before a checkpoint is made of it.

    Ignite's `TerminateOnNan` ends as if all were done; this one ends with an `InputError` that names the step, the
    subjects of the batch (``subject_key`` of its items, where they have it) and the last good checkpoint.

    Args:
        checkpoint_dir: where the training's checkpoints lie.
        subject_key: key of the batch that holds names.
    """

    def __init__(self, checkpoint_dir: str, subject_key: str = "name") -> None:
        self.checkpoint_dir, self.subject_key = checkpoint_dir, subject_key
        self.loss = from_engine("loss", first=True)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        loss = float(self.loss(engine.state.output))
        if math.isfinite(loss):
            return
        batch = engine.state.batch if isinstance(engine.state.batch, list) else [engine.state.batch]
        names: set[str] = set()
        for item in batch:
            given = item.get(self.subject_key, [])
            names.update([given] if isinstance(given, str) else given)
        raise InputError(
            f"the loss became {loss} at step {engine.state.iteration} (epoch {engine.state.epoch}), with "
            f"{', '.join(sorted(names)) or 'unnamed subjects'} in the batch; look at these scans or lower "
            f"--learning_rate, then go on from the last good checkpoint: --resume auto ({self.checkpoint_dir})"
        )
