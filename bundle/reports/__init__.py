from .alignment import draw_alignment, draw_contact_sheet
from .figure import draw_report
from .findings import SaveFindings
from .metrics import SaveMetrics
from .resuming import finished_scans
from .tracking import slice_heatmaps, slice_images
from .viewer import LabelMapd, chosen
from .visits import CombineVisits

__all__ = [
    "CombineVisits",
    "LabelMapd",
    "SaveFindings",
    "SaveMetrics",
    "chosen",
    "draw_alignment",
    "draw_contact_sheet",
    "draw_report",
    "finished_scans",
    "slice_heatmaps",
    "slice_images",
]
