from .alignment import draw_alignment, draw_contact_sheet
from .figure import draw_report
from .findings import SaveFindings
from .metrics import SaveMetrics

__all__ = ["SaveFindings", "SaveMetrics", "draw_alignment", "draw_contact_sheet", "draw_report"]
