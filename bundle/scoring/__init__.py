from bundle.data.files import model_file

from .anomaly import anomaly_channels, fill_outside, smooth_inside
from .calibration import (
    INTENSITY_SCORES,
    LESION_SIGN,
    SCORES,
    Calibration,
    CalibrationFile,
    FitCalibration,
    fit_calibration,
    load_calibration,
    reconstruction_file,
    require_model,
    save_calibration,
    segmentation_file,
    usual_quantile,
)
from .fusion import RULES, Fusion, usual_weights
from .paper import PAPER_SCORES
from .transforms import AnomalyHeatmapd, CheckLikenessd, FindLesionsd, chosen_threshold, score_of

__all__ = [
    "INTENSITY_SCORES",
    "LESION_SIGN",
    "PAPER_SCORES",
    "RULES",
    "SCORES",
    "AnomalyHeatmapd",
    "Calibration",
    "CalibrationFile",
    "CheckLikenessd",
    "FindLesionsd",
    "FitCalibration",
    "Fusion",
    "anomaly_channels",
    "chosen_threshold",
    "fill_outside",
    "fit_calibration",
    "load_calibration",
    "model_file",
    "reconstruction_file",
    "require_model",
    "save_calibration",
    "score_of",
    "segmentation_file",
    "smooth_inside",
    "usual_quantile",
    "usual_weights",
]
