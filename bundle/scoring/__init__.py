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
    model_file,
    require_model,
    save_calibration,
)
from .transforms import AnomalyHeatmapd, FindLesionsd

__all__ = [
    "INTENSITY_SCORES",
    "LESION_SIGN",
    "SCORES",
    "AnomalyHeatmapd",
    "Calibration",
    "CalibrationFile",
    "FindLesionsd",
    "FitCalibration",
    "anomaly_channels",
    "fill_outside",
    "fit_calibration",
    "load_calibration",
    "model_file",
    "require_model",
    "save_calibration",
    "smooth_inside",
]
