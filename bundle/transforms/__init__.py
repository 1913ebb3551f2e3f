from .alignment import AlignToAtlasd
from .anomalies import Anomaliesd, RandAnomaliesd
from .bias import CorrectBiasFieldd
from .brain import BrainMaskd
from .contrast import TellContrastd, contrast_likeness
from .coverage import EXAMINED, NOT_EXAMINED, MarkCoveraged, RestoreCoveraged
from .intensity import CurvatureFlowd, NormalizeBrainIntensityd, RandCoarseNoised, learn_landmarks
from .labels import CheckLabelsd, IgnoreLabelsd
from .load import LoadScand
from .normative import LESION_SIGN, NormativeMap, fit_normative, load_normative, normative_file
from .outside import FillOutsided
from .recovery import RecoverBraind
from .sampling import (
    AxialSlabsd,
    AxialSlicesd,
    CollateRandCentres,
    DenseLocationsd,
    FindBrainSlicesd,
    RandAxialSlabsd,
    RandAxialSlicesd,
    RandPatchesd,
    slabs,
    with_normative,
)
from .spatial import KeepVolumed, ResampleToGrid, ResampleToGridd
from .ventricles import RandWideVentriclesd
from .visit import register_rigidly

__all__ = [
    "EXAMINED",
    "LESION_SIGN",
    "NOT_EXAMINED",
    "AlignToAtlasd",
    "Anomaliesd",
    "AxialSlabsd",
    "AxialSlicesd",
    "BrainMaskd",
    "CheckLabelsd",
    "CollateRandCentres",
    "CorrectBiasFieldd",
    "CurvatureFlowd",
    "DenseLocationsd",
    "FillOutsided",
    "FindBrainSlicesd",
    "IgnoreLabelsd",
    "KeepVolumed",
    "LoadScand",
    "MarkCoveraged",
    "NormalizeBrainIntensityd",
    "NormativeMap",
    "RandAnomaliesd",
    "RandAxialSlabsd",
    "RandAxialSlicesd",
    "RandCoarseNoised",
    "RandPatchesd",
    "RandWideVentriclesd",
    "RecoverBraind",
    "ResampleToGrid",
    "ResampleToGridd",
    "RestoreCoveraged",
    "TellContrastd",
    "contrast_likeness",
    "fit_normative",
    "learn_landmarks",
    "load_normative",
    "normative_file",
    "register_rigidly",
    "slabs",
    "with_normative",
]
