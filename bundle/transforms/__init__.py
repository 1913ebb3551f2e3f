from .alignment import AlignToAtlasd
from .brain import BrainMaskd
from .intensity import CorrectBiasFieldd, CurvatureFlowd, NormalizeBrainIntensityd, RandCoarseNoised, learn_landmarks
from .load import CheckLabelsd, IgnoreLabelsd, LoadScand
from .outside import FillOutsided, MaskOutsided
from .sampling import AxialSlicesd, DenseLocationsd, FindBrainSlicesd, RandAxialSlicesd, RandPatchesd
from .spatial import KeepVolumed, ResampleToGrid, ResampleToGridd

__all__ = [
    "AlignToAtlasd",
    "AxialSlicesd",
    "BrainMaskd",
    "CheckLabelsd",
    "CorrectBiasFieldd",
    "CurvatureFlowd",
    "DenseLocationsd",
    "FillOutsided",
    "FindBrainSlicesd",
    "IgnoreLabelsd",
    "KeepVolumed",
    "LoadScand",
    "MaskOutsided",
    "NormalizeBrainIntensityd",
    "RandAxialSlicesd",
    "RandCoarseNoised",
    "RandPatchesd",
    "ResampleToGrid",
    "ResampleToGridd",
    "learn_landmarks",
]
