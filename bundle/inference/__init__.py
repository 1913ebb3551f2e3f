from .embedding import Embedding, EmbeddingMapd, embedding_file, fit_embedding, load_embedding
from .inferer import AutocastInferer, PatchLocationInferer, WeightsCheckpointLoader
from .reconstruction import ReconstructionMapd
from .scans import ScanDataset, ScanEvaluator

__all__ = [
    "AutocastInferer",
    "Embedding",
    "EmbeddingMapd",
    "PatchLocationInferer",
    "ReconstructionMapd",
    "ScanDataset",
    "ScanEvaluator",
    "WeightsCheckpointLoader",
    "embedding_file",
    "fit_embedding",
    "load_embedding",
]
