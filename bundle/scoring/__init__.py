from .anomaly import anomaly_channels, fill_outside
from .calibration import (
    BASELINES,
    LESION_SIGN,
    SCORES,
    Calibration,
    FitCalibration,
    fit_calibration,
    load_calibration,
    save_calibration,
)
from .transforms import AnomalyHeatmapd

__all__ = [
    "BASELINES",
    "LESION_SIGN",
    "SCORES",
    "AnomalyHeatmapd",
    "Calibration",
    "FitCalibration",
    "anomaly_channels",
    "fill_outside",
    "fit_calibration",
    "load_calibration",
    "save_calibration",
]
