from .atlas import Atlas, grid_affine, load_atlas
from .cohort import prepare_cohort
from .collate import collate_samples
from .datalist import evaluation_items, load_datalist, require_dataset
from .discovery import find_scans
from .files import claim_folder
from .recipe import Recipe, load_recipe
from .scan_list import list_scans
from .splits import split_people
from .visits import list_visits

__all__ = [
    "Atlas",
    "Recipe",
    "claim_folder",
    "collate_samples",
    "evaluation_items",
    "find_scans",
    "grid_affine",
    "list_scans",
    "list_visits",
    "load_atlas",
    "load_datalist",
    "load_recipe",
    "prepare_cohort",
    "require_dataset",
    "split_people",
]
