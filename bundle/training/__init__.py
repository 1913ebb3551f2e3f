"""What keeps a training safe: checkpoints to go on from, and a stop before a broken loss breaks the model."""

from .checkpoints import TrainingCheckpoints
from .finite_loss import RequireFiniteLoss

__all__ = ["RequireFiniteLoss", "TrainingCheckpoints"]
