from .auprc import average_precision
from .case import CASE_METRICS, CaseMeasures, measure_case
from .curves import ScoreCurve, best_threshold
from .evaluation import BASELINES, CompareMethodsd, ToSpaced, measure_methods, method_keys
from .lesions import count_lesions, match_lesions, recall_at_false_positives
from .localisation import LocalisationErrorMetric
from .summary import Case, summarise

__all__ = [
    "BASELINES",
    "CASE_METRICS",
    "Case",
    "CaseMeasures",
    "CompareMethodsd",
    "LocalisationErrorMetric",
    "ScoreCurve",
    "ToSpaced",
    "average_precision",
    "best_threshold",
    "count_lesions",
    "match_lesions",
    "measure_case",
    "measure_methods",
    "method_keys",
    "recall_at_false_positives",
    "summarise",
]
