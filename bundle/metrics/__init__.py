from .auprc import AUPRCMetric, average_precision
from .evaluation import BASELINES, BaselineMapsd, comparison_metrics, inside_brain
from .localisation import LocalisationErrorMetric

__all__ = [
    "BASELINES",
    "AUPRCMetric",
    "BaselineMapsd",
    "LocalisationErrorMetric",
    "average_precision",
    "comparison_metrics",
    "inside_brain",
]
