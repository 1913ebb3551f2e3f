from .embedding import Embedding, EmbeddingMapd, fit_embedding, load_embedding
from .inferer import AutocastInferer, PatchLocationInferer, WeightsCheckpointLoader
from .reconstruction import ReconstructionMapd
from .scans import ScanDataset, ScanEvaluator
from .segmentation import SegmentationMapd

__all__ = [
    "AutocastInferer",
    "Embedding",
    "EmbeddingMapd",
    "PatchLocationInferer",
    "ReconstructionMapd",
    "ScanDataset",
    "ScanEvaluator",
    "SegmentationMapd",
    "WeightsCheckpointLoader",
    "fit_embedding",
    "load_embedding",
]
