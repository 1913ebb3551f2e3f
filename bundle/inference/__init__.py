from .inferer import AutocastInferer, PatchLocationInferer, WeightsCheckpointLoader
from .reconstruction import ReconstructionMapd
from .scans import ScanDataset, ScanEvaluator

__all__ = [
    "AutocastInferer",
    "PatchLocationInferer",
    "ReconstructionMapd",
    "ScanDataset",
    "ScanEvaluator",
    "WeightsCheckpointLoader",
]
