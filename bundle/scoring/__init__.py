from bundle.data.files import model_file

from .anomaly import anomaly_channels, fill_outside, smooth_inside
from .calibration import FitCalibration, fit_calibration
from .calibration_file import (
    CalibrationFile,
    load_calibration,
    require_model,
    save_calibration,
)
from .combination import combine_contrasts, excess_ml, leading_contrast, sees
from .fusion import RULES, Fusion, usual_weights
from .model_folder import PARTS, model_files, part_file
from .operating import POINTS, operating_points
from .paper import PAPER_SCORES
from .scores import INTENSITY_SCORES, LESION_SIGN, SCORES, Calibration, Score
from .transforms import AnomalyHeatmapd, CheckLikenessd, FindLesionsd, IfNeededd, chosen_threshold, score_of

__all__ = [
    "INTENSITY_SCORES",
    "LESION_SIGN",
    "PAPER_SCORES",
    "PARTS",
    "POINTS",
    "RULES",
    "SCORES",
    "AnomalyHeatmapd",
    "Calibration",
    "CalibrationFile",
    "CheckLikenessd",
    "FindLesionsd",
    "FitCalibration",
    "Fusion",
    "IfNeededd",
    "Score",
    "anomaly_channels",
    "chosen_threshold",
    "combine_contrasts",
    "excess_ml",
    "fill_outside",
    "fit_calibration",
    "leading_contrast",
    "load_calibration",
    "model_file",
    "model_files",
    "operating_points",
    "part_file",
    "require_model",
    "save_calibration",
    "score_of",
    "sees",
    "smooth_inside",
    "usual_weights",
]
