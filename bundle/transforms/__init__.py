from .brain import BrainMaskd
from .intensity import CorrectBiasFieldd, NormalizeBrainIntensityd
from .load import LoadScand
from .outside import FillOutsided, MaskOutsided
from .sampling import AxialSlicesd, DenseLocationsd, RandAxialSlicesd, RandPatchesd
from .spatial import AlignToAtlasd, ResampleToGrid, ResampleToGridd

__all__ = [
    "AlignToAtlasd",
    "AxialSlicesd",
    "BrainMaskd",
    "CorrectBiasFieldd",
    "DenseLocationsd",
    "FillOutsided",
    "LoadScand",
    "MaskOutsided",
    "NormalizeBrainIntensityd",
    "RandAxialSlicesd",
    "RandPatchesd",
    "ResampleToGrid",
    "ResampleToGridd",
]
