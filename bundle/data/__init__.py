from .atlas import Atlas, grid_affine, load_atlas
from .cohort import Recipe, find_scans, load_recipe, prepare_cohort, split_people
from .collate import collate_samples
from .datalist import evaluation_items, list_scans, load_datalist, require_dataset
from .files import claim_folder
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
