from .auprc import AUPRCMetric, PooledAUPRCMetric, average_precision
from .evaluation import BASELINES, BaselineMapsd, comparison_metrics, inside_brain
from .localisation import LocalisationErrorMetric

__all__ = [
    "BASELINES",
    "AUPRCMetric",
    "BaselineMapsd",
    "LocalisationErrorMetric",
    "PooledAUPRCMetric",
    "average_precision",
    "comparison_metrics",
    "inside_brain",
]
