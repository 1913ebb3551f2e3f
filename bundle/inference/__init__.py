from .inferer import AutocastInferer, PatchLocationInferer
from .reconstruction import ReconstructionMapd
from .scans import ScanDataset, ScanEvaluator

__all__ = ["AutocastInferer", "PatchLocationInferer", "ReconstructionMapd", "ScanDataset", "ScanEvaluator"]
