from .inferer import AutocastInferer, PatchLocationInferer, WeightsCheckpointLoader
from .reconstruction import ReconstructionMapd
from .scans import ScanDataset, ScanEvaluator
from .segmentation import SegmentationMapd

__all__ = [
    "AutocastInferer",
    "PatchLocationInferer",
    "ReconstructionMapd",
    "ScanDataset",
    "ScanEvaluator",
    "SegmentationMapd",
    "WeightsCheckpointLoader",
]
