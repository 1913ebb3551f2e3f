"""A calibration as files, and what is checked before one is used."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from nibabel.filebasedimages import ImageFileError

from bundle.data.datalist import CHAIN
from bundle.data.files import CONTRASTS, calibrated_contrasts, file_hash, of_contrast, read_json, write_json
from bundle.data.population import read_maps, write_maps
from bundle.errors import InputError
from bundle.transforms.normative import ALL, MATCHING, load_normative, normative_file

from .fusion import Fusion, replaced
from .model_folder import PARTS, part_file
from .scores import Calibration

# what reading files that are no longer whole raises
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, EOFError, zlib.error, ImageFileError)


def model_hash(model_file: str | Path, contrast: str) -> str:
    """SHA-256 of a model and, where they lie beside it, of its intensity landmarks and normative map: with others of
    any, a scan scores differently.
    """
    digest = hashlib.sha256(Path(model_file).read_bytes())
    for name in (f"landmarks_{contrast}.json", f"normative_{contrast}.json"):
        beside = Path(model_file).with_name(name)
        digest.update(beside.read_bytes() if beside.is_file() else b"")
    return digest.hexdigest()


def map_hashes(model_file: str | Path, contrast: str) -> dict[str, str | None]:
    """SHA-256 of the file of each of `PARTS` beside a model, as "PART_sha256"; None where there is none."""
    hashes = {}
    for part in PARTS:
        file = Path(part_file(part, Path(model_file).parent, contrast))
        hashes[f"{part}_sha256"] = file_hash(file) if file.is_file() else None
    return hashes


def save_calibration(calibration: Calibration, path: str | Path, affine: np.ndarray) -> None:
    """Write ``path`` (JSON: quantiles, provenance, names of the maps) and beside it ``.nii.gz`` (the maps, 16 bit).

    Args:
        calibration: to save.
        path: ends in .json.
        affine: of the maps, voxel to atlas mm.
    """
    path = Path(path)
    volumes = {f"{n}_{kind}": getattr(calibration, kind)[n] for n in calibration.mean for kind in ("mean", "spread")}
    index = write_maps(path.with_suffix(".nii.gz"), volumes, affine)
    write_json(
        path,
        {
            "contrast": calibration.contrast,
            "filter_sigma": dict(calibration.filter_sigma),
            "location": list(calibration.location),
            **({} if calibration.telling == ALL else {"telling": calibration.telling}),
            "provenance": dict(calibration.provenance),
            "fusion": None if calibration.fusion is None else asdict(calibration.fusion),
            "quantiles": calibration.quantiles,
            "points": calibration.points,
            "maps": index,
        },
    )


def require_model(model_file: str | Path) -> None:
    """Raise an `InputError` unless there is a file of that name."""
    if not Path(model_file).is_file():
        raise InputError(f"{model_file}: no trained model here; train one or name its folder with --ckpt_dir")


def load_calibration(
    path: str | Path,
    model_file: str | Path,
    grid: Mapping[str, Any] | None = None,
    fusion_rule: str | None = None,
    fusion_weights: Mapping[str, float] | None = None,
) -> Calibration:
    """Read what `save_calibration` wrote and check that it belongs to the model.

    Args:
        path: the JSON file.
        model_file: the model that is going to be used.
        grid: ``spacing``, ``spatial_size``, ``center`` and ``stride`` that are going to be used; None: not checked.
        fusion_rule, fusion_weights: instead of those that the calibration was made with; its thresholds of the fusion
            are there only if they are the same.

    Raises:
        InputError: missing or damaged, made with another model or for another grid.
    """
    require_model(model_file)
    there = sorted(f.stem.removeprefix("calibration_") for f in Path(path).parent.glob("calibration_*.json"))
    known = f"; there are those of --contrast {', '.join(there)}" if there else ""
    content = read_json(path, f"calibration (make it with: run calibration --ckpt_dir {Path(path).parent}{known})")
    try:
        about = content["provenance"]
        if (about.get("chain"), about.get("matching")) != (CHAIN, MATCHING):
            raise InputError(f"{path}: made by an older version; run the calibration again (docs/README.md)")
        if about["model_sha256"] != model_hash(model_file, content["contrast"]):
            raise InputError(
                f"{path}: made with another model (or landmarks, or normative map) than {model_file}; "
                "run the calibration again"
            )
        for part, found in zip(PARTS, map_hashes(model_file, content["contrast"]).values()):
            if part in content["filter_sigma"] and found not in (None, about[f"{part}_sha256"]):
                raise InputError(
                    f"{path}: made with another {part} model than lies beside {model_file}; run the calibration again"
                )
        if grid is not None and about["grid"] != dict(grid):
            raise InputError(
                f"{path}: made on another grid ({about['grid']}) than is configured ({dict(grid)}); "
                "merge the config of the grid that the model was trained on, with the calibration's --stride"
            )
        volumes = read_maps(Path(path).with_suffix(".nii.gz"), content["maps"])
        names = [n.removesuffix("_mean") for n in volumes if n.endswith("_mean")]
        mean, spread = ({n: volumes[f"{n}_{kind}"] for n in names} for kind in ("mean", "spread"))
        stored = None if content["fusion"] is None else Fusion(**content["fusion"])
        fusion = replaced(stored, fusion_rule, fusion_weights)
        quantiles, points = (
            {n: v for n, v in content[key].items() if n != "fusion" or fusion == stored}
            for key in ("quantiles", "points")
        )
        sigmas = {str(name): float(sigma) for name, sigma in content["filter_sigma"].items()}
        normative = load_normative(normative_file(Path(model_file).parent, content["contrast"]))
        lowest, highest = map(float, content.get("telling", ALL))
        return Calibration(
            content["contrast"],
            mean,
            spread,
            quantiles,
            sigmas,
            about,
            normative,
            fusion,
            points,
            tuple(content["location"]),
            (lowest, highest),
        )
    except DAMAGE as error:
        raise InputError(f"{path}: damaged calibration ({error!r}); run the calibration again") from error


class CalibrationFile:
    """A calibration that is read when it is first needed, so that a bundle can be looked at before it is trained; or
    those of several contrasts, where the names of the files are of "auto" (`of_contrast`).

    As a handler it reads the file when the engine starts: before the first scan, not after it.

    Args:
        path, model_file, grid, fusion_rule, fusion_weights: see `load_calibration`.
    """

    def __init__(
        self,
        path: str,
        model_file: str,
        grid: Mapping[str, Any] | None = None,
        fusion_rule: str | None = None,
        fusion_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.path, self.model_file, self.grid = str(Path(path)), model_file, grid
        self.fusion_rule, self.fusion_weights = fusion_rule, fusion_weights
        self._loaded: Calibration | None = None
        self._each: dict[str, CalibrationFile] = {}

    def each(self) -> dict[str, CalibrationFile]:
        """The calibrations, of one contrast each, by their contrasts."""
        if of_contrast(self.path, CONTRASTS[0]) == str(self.path):
            return {self.load().contrast: self}
        for contrast in calibrated_contrasts(Path(self.path).parent) if not self._each else ():
            files = of_contrast(self.path, contrast), of_contrast(self.model_file, contrast)
            self._each[contrast] = CalibrationFile(*files, self.grid, self.fusion_rule, self.fusion_weights)
        return self._each

    def load(self, contrast: str | None = None) -> Calibration:
        """The calibration, of several that of ``contrast``; errors as of `load_calibration`."""
        if of_contrast(self.path, CONTRASTS[0]) != str(self.path):
            return self.each()[contrast or ""].load()
        if self._loaded is None:
            self._loaded = load_calibration(
                self.path, self.model_file, self.grid, self.fusion_rule, self.fusion_weights
            )
        return self._loaded

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda _: [file.load() for file in self.each().values()])
