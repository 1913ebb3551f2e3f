from .brain import BrainMaskd
from .intensity import CorrectBiasFieldd, NormalizeBrainIntensityd
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
    "MaskOutsided",
    "NormalizeBrainIntensityd",
    "RandAxialSlicesd",
    "RandPatchesd",
    "ResampleToGrid",
    "ResampleToGridd",
]
