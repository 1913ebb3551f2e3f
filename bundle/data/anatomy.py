"""Where the people of a cohort have fluid, in which no lesion lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bundle.errors import InputError

from .datalist import SECTIONS
from .files import read_json
from .planting import share_of_voxels


class Anatomies:
    """Anatomical labels of people. False if there are none.

    A mask that was drawn in another brain, or a sphere, can reach into a person's ventricles and sulci; a lesion does
    not. What has no label is not taken for fluid.

    Args:
        dataset_dirs: prepared datasets, whose items can have an ``anatomy_label``, in the atlas' space.
        tissues: labels of each tissue, as `bundle.synthesis.SCHEMES` has them; "csf" is fluid.
    """

    def __init__(self, dataset_dirs: Sequence[str | Path], tissues: Mapping[str, set[int]]) -> None:
        self.fluid, self.known = sorted(tissues["csf"]), set[int]().union(*tissues.values())
        self.files: dict[str, set[str]] = {}
        for folder in dataset_dirs:
            content = read_json(Path(folder) / "datalist.json", "list of the dataset")
            sections = content if isinstance(content, dict) else {}  # `load_datalist` tells what is wrong with a list
            for item in (item for section in SECTIONS for item in sections.get(section) or []):
                if isinstance(item, dict) and item.get("anatomy_label"):
                    self.files.setdefault(owner(item), set()).add(str(Path(folder) / item["anatomy_label"]))

    def __bool__(self) -> bool:
        return bool(self.files)

    def file_of(self, scan: Mapping[str, Any]) -> str:
        """The labels of a scan, or else of its person.

        Raises:
            InputError: none, or several, and nothing tells which.
        """
        own = scan.get("anatomy_label")
        files = {str(own)} if own else self.files.get(owner(scan), set())
        if len(files) != 1:
            raise InputError(
                f"{scan['image']}: {len(files) or 'no'} maps of anatomical labels of {owner(scan)} are there; name a "
                "dataset that has one of each person: --anatomy_dir"
            )
        return next(iter(files))

    def without_fluid(self, soft: np.ndarray, scan: Mapping[str, Any], to_atlas: np.ndarray) -> np.ndarray:
        """A lesion without what would lie in the person's fluid.

        Args:
            soft: ``[X, Y, Z]``, how much of each voxel of the raw scan is lesion, in [0, 1].
            scan: item of `load_datalist`.
            to_atlas: from the raw scan's voxels to the atlas' world.

        Raises:
            InputError: see `file_of`; labels that the scheme does not know.
        """
        file = self.file_of(scan)
        image: Any = nib.load(file)
        labels = np.asarray(image.dataobj)
        unknown = set(np.unique(labels).tolist()) - {0} - self.known
        if unknown:
            raise InputError(f"{file}: label {min(unknown):g} is none of this scheme; name another: --label_scheme")
        return soft * (1 - share_of_voxels(np.isin(labels, self.fluid), image.affine, soft.shape, to_atlas))


def owner(scan: Mapping[str, Any]) -> str:
    """Whose scan it is, as far as its item tells."""
    return str(scan.get("person") or scan.get("subject") or scan["image"])
