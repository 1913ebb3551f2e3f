from .contrast import TISSUE_ORDER, RandTissueContrastd, draw_brightness
from .scanner import RandCoilShadingd, RandSkullStripErrord, RandThickSlicesd, average_slices, coil_shading
from .tissue import TISSUES, TissueFractionsd
from .writer import write_scans

__all__ = [
    "TISSUES",
    "TISSUE_ORDER",
    "RandCoilShadingd",
    "RandSkullStripErrord",
    "RandThickSlicesd",
    "RandTissueContrastd",
    "TissueFractionsd",
    "average_slices",
    "coil_shading",
    "draw_brightness",
    "write_scans",
]
