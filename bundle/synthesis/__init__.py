from .contrast import TISSUE_ORDER, RandTissueContrastd, draw_brightness
from .scanner import RandSkullStripErrord, RandThickSlicesd
from .tissue import TISSUES, TissueFractionsd
from .writer import write_scans

__all__ = [
    "TISSUES",
    "TISSUE_ORDER",
    "RandSkullStripErrord",
    "RandThickSlicesd",
    "RandTissueContrastd",
    "TissueFractionsd",
    "draw_brightness",
    "write_scans",
]
