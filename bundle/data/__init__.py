from .atlas import Atlas, grid_affine, load_atlas
from .cohort import Recipe, find_scans, load_recipe, prepare_cohort, split_subjects
from .datalist import list_scans, load_datalist

__all__ = [
    "Atlas",
    "Recipe",
    "find_scans",
    "grid_affine",
    "list_scans",
    "load_atlas",
    "load_datalist",
    "load_recipe",
    "prepare_cohort",
    "split_subjects",
]
