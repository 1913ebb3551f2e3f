from .alignment import AlignToAtlasd
from .brain import BrainMaskd
from .bias import CorrectBiasFieldd
from .intensity import CurvatureFlowd, NormalizeBrainIntensityd, RandCoarseNoised, learn_landmarks
from .load import CheckLabelsd, IgnoreLabelsd, LoadScand
from .normative import NormativeMap, fit_normative, load_normative, normative_file
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
    "NormativeMap",
    "fit_normative",
    "learn_landmarks",
    "load_normative",
    "normative_file",
]
