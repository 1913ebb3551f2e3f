from .figure import draw_report
from .findings import SaveFindings
from .metrics import SaveMetrics

__all__ = ["SaveFindings", "SaveMetrics", "draw_report"]
