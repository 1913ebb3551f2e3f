from .auprc import AUPRCMetric, average_precision
from .evaluation import BASELINES, BaselineMapsd, comparison_metrics, inside_brain
from .lesions import count_lesions, recall_at_false_positives
from .localisation import LocalisationErrorMetric

__all__ = [
    "BASELINES",
    "AUPRCMetric",
    "BaselineMapsd",
    "LocalisationErrorMetric",
    "average_precision",
    "comparison_metrics",
    "count_lesions",
    "inside_brain",
    "recall_at_false_positives",
]
