from .inferer import PatchLocationInferer
from .scans import ScanDataset, ScanEvaluator

__all__ = ["PatchLocationInferer", "ScanDataset", "ScanEvaluator"]
