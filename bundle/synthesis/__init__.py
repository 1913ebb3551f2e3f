from .contrast import REGION_BRIGHTNESS, TISSUE_ORDER, RandTissueContrastd, draw_brightness
from .scanner import RandCoilShadingd, RandSkullStripErrord, RandThickSlicesd, average_slices, coil_shading
from .tissue import REGION_NAMES, REGIONS, SCHEMES, TISSUES, TissueFractionsd
from .writer import write_scans

__all__ = [
    "REGIONS",
    "REGION_BRIGHTNESS",
    "REGION_NAMES",
    "SCHEMES",
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
