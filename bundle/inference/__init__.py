from .inferer import AutocastInferer, PatchLocationInferer
from .scans import ScanDataset, ScanEvaluator

__all__ = ["AutocastInferer", "PatchLocationInferer", "ScanDataset", "ScanEvaluator"]
