"""Population calibration: what is usual at this place of a healthy brain, and what is not.

The raw score depends on where one looks: cortex and skull base always localise worse than the ventricles. Healthy
people who were not trained on tell, for every place of the atlas, the usual score and its spread; the heatmap counts
how many spreads a scan lies above it. The same scans, each judged by the others, give the threshold.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ignite.engine import Engine, Events
from nibabel.filebasedimages import ImageFileError

from bundle.command_line import record_run
from bundle.data.datalist import CHAIN
from bundle.data.files import claim_folder, read_json, write_json
from bundle.data.population import coarse_affine, coarsen, coarsening, population_maps, read_maps, write_maps
from bundle.errors import InputError
from bundle.transforms.normative import LESION_SIGN, MEAN_MM, SPREAD_MM, NormativeMap, load_normative, normative_file

from .anomaly import fill_outside, smooth_inside
from .fusion import Fusion
from .paper import PAPER_SCORES, paper_quantiles, paper_score

# maps that are calibrated; "location" is the sum of the two channels, each calibrated
MAPS = ("squared_error", "variance", "location", "intensity")
# scores that need no network: the trivial methods that every table must show, judged without any filter
INTENSITY_SCORES = ("atlas_z", "intensity", "intensity_opposite")
# what can be asked of `Calibration.score` of every scan; also "fusion", and maps that a scan brings along
SCORES = ("location", "squared_error", "variance", "uncalibrated", *INTENSITY_SCORES)
QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
_USUAL_QUANTILES = {
    **{("t1", "fusion"): 0.9998, ("t2", "fusion"): 0.9999, ("flair", "fusion"): 0.9999},
    **dict.fromkeys((("t1", "location"), ("t2", "location"), ("flair", "location")), 0.9998),
}
# A z-score far beyond the healthy ones says no more than one just beyond, and two wrong voxels must not outweigh a
# lesion; smoothing takes noise and misalignment away and lets lesions of 3 mm be (docs/results.md).
_Z_RANGE, _Z_FILTER_MM = (-4.0, 10.0), 2.0


@dataclass(frozen=True)
class Calibration:
    """Mean and spread of healthy score maps in atlas space, and quantiles of healthy scores.

    Attributes:
        contrast: of the scans.
        mean, spread: name in `MAPS`, or of a map that the scans brought along -> ``[1, h, w, d]``; may be coarser than
            the grid, of the same extent.
        quantiles: name of a score -> {quantile as text: score}, of the brain voxels of the median healthy scan, each
            left out of the maps.
        filter_sigma: of the Gaussian that the anomaly channels pass first (`smooth_inside`), voxels of the grid.
        z_sigma: of the Gaussian over the z-score of the intensity, voxels of the grid.
        provenance: number of subjects, hashes of the models, grid.
        fusion: what "fusion" means.
    """

    contrast: str
    mean: Mapping[str, torch.Tensor]
    spread: Mapping[str, torch.Tensor]
    quantiles: Mapping[str, Mapping[str, float]]
    filter_sigma: float
    z_sigma: float
    provenance: Mapping[str, Any]
    fusion: Fusion | None = None

    @property
    def extra_maps(self) -> list[str]:
        """Names of the maps beyond `MAPS`: those of other methods, which each scan must bring along."""
        return [name for name in self.mean if name not in MAPS]

    def standardise(self, name: str, volume: torch.Tensor) -> torch.Tensor:
        """(volume - mean) / spread of map ``name``, for ``[1, H, W, D]`` on the atlas grid."""
        mean, spread = (
            F.interpolate(m[None].to(volume), volume.shape[1:], mode="trilinear", align_corners=False)[0]
            for m in (self.mean[name], self.spread[name])
        )
        return (volume - mean) / spread

    def score(
        self, name: str, channels: torch.Tensor, image: torch.Tensor, maps: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Score map ``[1, H, W, D]``, larger is more abnormal; outside the brain the lowest score inside.

        Args:
            name: "location" (the sum of both channels, each calibrated, calibrated again), "squared_error" or
                "variance" (one calibrated channel), "uncalibrated" (the paper's sum as it is), "atlas_z" (z-score of
                the intensity at its place, signed so that lesions are high, bounded and slightly smoothed), "intensity"
                (signed), "intensity_opposite" (its other tail), a name in `extra_maps` (calibrated), "fusion" (of any
                of these). All but those of the intensity are filtered and, calibrated, brought to the scan's own usual
                level, see `within_scan`.
            channels: anomaly channels ``[2, H, W, D]``.
            image: normalised intensities ``[1, H, W, D]``, 0 outside the brain.
            maps: of other methods ``[1, H, W, D]``, by name.

        Raises:
            InputError: a score that there is none of, or a map that the scan or the calibration lacks.
        """
        if name in PAPER_SCORES:
            return paper_score(name, channels, image > 0)
        maps = maps or {}
        if name not in INTENSITY_SCORES:
            channels = smooth_inside(channels, image > 0, self.filter_sigma)
            maps = {key: smooth_inside(volume, image > 0, self.filter_sigma) for key, volume in maps.items()}
        return self._score_filtered(name, channels, image, maps)

    def _score_filtered(
        self, name: str, filtered: torch.Tensor, image: torch.Tensor, maps: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """`score` of channels and maps that were filtered already."""
        inside = image > 0
        if name == "fusion":
            if self.fusion is None:
                raise InputError("score 'fusion' needs a rule and weights (fusion_rule, fusion_weights)")
            parts = {part: self._score_filtered(part, filtered, image, maps) for part in self.fusion.weights}
            return fill_outside(self.fusion(parts, inside), inside)
        if name in self.extra_maps:
            if name not in maps:
                raise InputError(f"the map '{name}' is missing for this scan")
            return fill_outside(within_scan(self.standardise(name, maps[name]), inside), inside)
        if name not in SCORES:
            raise InputError(f"no map '{name}' in the calibration: run the calibration again with it")
        if name in INTENSITY_SCORES:
            sign = LESION_SIGN[self.contrast] * (-1 if name == "intensity_opposite" else 1)
            if name != "atlas_z":
                return fill_outside(sign * image, inside)
            z = (sign * self.standardise("intensity", image)).clamp(*_Z_RANGE)
            return fill_outside(smooth_inside(z, inside, self.z_sigma), inside)
        error, variance = filtered.split(1)
        if name == "uncalibrated":
            return fill_outside(error + variance, inside)
        error, variance = self.standardise("squared_error", error), self.standardise("variance", variance)
        if name == "location":
            score = self.standardise("location", error + variance)
        else:
            score = {"squared_error": error, "variance": variance}[name]
        return fill_outside(within_scan(score, inside), inside)

    def threshold(self, name: str, quantile: float) -> float:
        """Score that ``quantile`` of healthy brain voxels do not exceed.

        Raises:
            InputError: a score or quantile that was not stored.
        """
        try:
            return self.quantiles[name][f"{quantile:g}"]
        except KeyError as error:
            if name == "fusion" and name not in self.quantiles:
                raise InputError(
                    f"the calibration holds no threshold of the fusion '{self.fusion}': run the calibration with the "
                    "same fusion_rule and fusion_weights, or give --threshold"
                ) from error
            stored = ", ".join(self.quantiles.get(name, {})) or f"none for '{name}'"
            raise InputError(f"no threshold of score '{name}' at quantile {quantile}: stored are {stored}") from error


def within_scan(score: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Take off the scan's own median and, where its scores spread more than healthy ones do, divide by their spread
    (1.4826 times the median absolute deviation).

    Another scanner makes all patches a little harder to place. Lesions fill a small part of a brain and leave median
    and spread alone; a scan of the calibrated kind has 0 and 1 already.

    Args:
        score: calibrated, ``[1, H, W, D]``.
        inside: ``[1, H, W, D]`` bool.
    """
    centred = score - score[inside].median()
    return centred / (1.4826 * centred[inside].abs().median()).clamp(min=1.0)


def fit_calibration(
    channels: Sequence[torch.Tensor],
    images: Sequence[torch.Tensor],
    contrast: str,
    spacing: float,
    smoothing_mm: float = 4.0,
    filter_mm: float = 3.0,
    provenance: Mapping[str, Any] | None = None,
    maps: Mapping[str, Sequence[torch.Tensor]] | None = None,
    fusion: Fusion | None = None,
    normative: NormativeMap | None = None,
) -> Calibration:
    """Fit maps and quantiles to healthy scans.

    The quantiles come from scores of each scan under maps of the others: a scan is closer to maps that it helped to
    make, and a threshold taken from there would be too low for a new person.

    Args:
        channels: per scan, anomaly channels ``[2, H, W, D]``.
        images: per scan, normalised intensities ``[1, H, W, D]``, 0 outside the brain.
        contrast: one of `LESION_SIGN`.
        spacing: of the grid, mm; maps are kept at 2 mm where that is coarser.
        smoothing_mm: sigma of the Gaussian over the maps.
        filter_mm: sigma of the Gaussian over the anomaly channels and other methods' maps of each scan.
        provenance, fusion: see `Calibration`.
        maps: of other methods: name -> per scan ``[1, H, W, D]``.
        normative: mean and spread of the intensity, from other scans than these; None: from these.

    Raises:
        InputError: fewer than three scans, or an unknown contrast; a map of a name that is taken.
    """
    if len(images) < 3:
        raise InputError(f"calibration needs at least 3 healthy scans, got {len(images)}")
    if contrast not in LESION_SIGN:
        raise InputError(f"contrast '{contrast}' is unknown: use one of {', '.join(LESION_SIGN)}")
    maps = maps or {}
    taken = {"fusion", *MAPS, *SCORES} & set(maps)
    if taken:
        raise InputError(f"fusion_maps: '{taken.pop()}' is the name of a map of our own; choose another")
    factor = coarsening(spacing)
    sigma, filter_sigma = smoothing_mm / (spacing * factor), filter_mm / spacing
    sharp = (MEAN_MM / (spacing * factor), SPREAD_MM / (spacing * factor))
    raw: dict[str, torch.Tensor] = {}

    def smoothed(volumes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [smooth_inside(v, i > 0, filter_sigma) for v, i in zip(volumes, images)]

    smooth, maps = smoothed(channels), {name: smoothed(volumes) for name, volumes in maps.items()}
    for name, volumes in (
        ("squared_error", [c[:1] for c in smooth]),
        ("variance", [c[1:] for c in smooth]),
        ("intensity", images),
        *maps.items(),
    ):
        raw[name] = torch.stack([coarsen(v, i > 0, factor) for v, i in zip(volumes, images)])

    def fit(rows: list[int]) -> Calibration:
        fitted = {
            name: population_maps(values[rows], *(sharp if name == "intensity" else (sigma,)))
            for name, values in raw.items()
            if name != "intensity" or normative is None
        }
        if normative is not None:
            fitted["intensity"] = (normative.mean, normative.spread)
        both = sum((raw[n][rows] - fitted[n][0]) / fitted[n][1] for n in ("squared_error", "variance"))
        fitted["location"] = population_maps(torch.as_tensor(both), sigma)
        mean, spread = ({n: fitted[n][k] for n in (*MAPS, *maps)} for k in (0, 1))
        return Calibration(contrast, mean, spread, {}, filter_sigma, _Z_FILTER_MM / spacing, {}, fusion)

    everyone = list(range(len(images)))
    names = [*SCORES, *maps, *(["fusion"] if fusion else [])]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for i in everyone:
        others = fit([j for j in everyone if j != i])
        own = {name: volumes[i] for name, volumes in maps.items()}
        for name, values in scores.items():
            values.append(others._score_filtered(name, smooth[i], images[i], own)[images[i] > 0].numpy())
    # of each scan, and then the median of them: pooled, one odd scan would set everybody's threshold
    typical = {name: np.median([np.quantile(v, QUANTILES) for v in scans], 0) for name, scans in scores.items()}
    keys = [f"{q:g}" for q in QUANTILES]
    quantiles = {name: dict(zip(keys, values.astype(float).tolist())) for name, values in typical.items()}
    about = {"subjects": len(images), **(provenance or {})}
    return replace(fit(everyone), quantiles=quantiles, provenance=about)


def usual_quantile(contrast: str, score: str) -> float:
    """Share of healthy brain voxels below the threshold that is used if none is named: of those stored, the least at
    which held-out healthy scans have, on average, at most two findings above 100 mm^3 with the shipped weights, or the
    highest, if none does (docs/results.md); 0.9995 for scores and contrasts that it was not looked up for.
    """
    return _USUAL_QUANTILES.get((contrast, score), 0.9995)


def model_hash(model_file: str | Path, contrast: str) -> str:
    """SHA-256 of a model and, where they lie beside it, of its intensity landmarks and normative map: with others of
    any, a scan scores differently.
    """
    digest = hashlib.sha256(Path(model_file).read_bytes())
    for name in (f"landmarks_{contrast}.json", f"normative_{contrast}.json"):
        beside = Path(model_file).with_name(name)
        digest.update(beside.read_bytes() if beside.is_file() else b"")
    return digest.hexdigest()


def reconstruction_file(ckpt_dir: str | Path, contrast: str) -> str:
    """The reconstruction network's weights of a contrast in a folder."""
    return str(Path(ckpt_dir) / f"reconstruction_{contrast}.pt")


def segmentation_file(ckpt_dir: str | Path, contrast: str) -> str:
    """The segmentation network's weights of a contrast in a folder."""
    return str(Path(ckpt_dir) / f"segmentation_{contrast}.pt")


def map_hashes(model_file: str | Path, contrast: str) -> dict[str, str | None]:
    """SHA-256 of the weights of our pixel-wise methods beside a model, by the method's name; None where there are none.
    """
    files = {name: Path(model_file).with_name(f"{name}_{contrast}.pt") for name in ("reconstruction", "segmentation")}
    return {k: hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else None for k, f in files.items()}


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
            "filter_sigma": calibration.filter_sigma,
            "z_sigma": calibration.z_sigma,
            "provenance": dict(calibration.provenance),
            "fusion": None if calibration.fusion is None else asdict(calibration.fusion),
            "quantiles": calibration.quantiles,
            "maps": index,
        },
    )


def require_model(model_file: str | Path) -> None:
    """Raise an `InputError` unless there is a file of that name."""
    if not Path(model_file).is_file():
        raise InputError(f"{model_file}: no trained model here; train one or name its folder with --ckpt_dir")


def load_calibration(
    path: str | Path, model_file: str | Path, grid: Mapping[str, Any] | None = None, fusion: Fusion | None = None
) -> Calibration:
    """Read what `save_calibration` wrote and check that it belongs to the model.

    Args:
        path: the JSON file.
        model_file: the model that is going to be used.
        grid: ``spacing``, ``spatial_size``, ``center`` and ``stride`` that are going to be used; None: not checked.
        fusion: that is going to be used; its thresholds are there only if the calibration was made with the same.

    Raises:
        InputError: missing or damaged, made with another model or for another grid.
    """
    require_model(model_file)
    there = sorted(f.stem.removeprefix("calibration_") for f in Path(path).parent.glob("calibration_*.json"))
    known = f"; there are those of --contrast {', '.join(there)}" if there else ""
    content = read_json(path, f"calibration (make it with: run calibration --ckpt_dir {Path(path).parent}{known})")
    try:
        about = content["provenance"]
        if about.get("chain") != CHAIN:
            raise InputError(f"{path}: made by an older version; run the calibration again (docs/README.md)")
        if about["model_sha256"] != model_hash(model_file, content["contrast"]):
            raise InputError(
                f"{path}: made with another model (or landmarks, or normative map) than {model_file}; "
                "run the calibration again"
            )
        for name, found in map_hashes(model_file, content["contrast"]).items():
            if f"{name}_mean" in content["maps"] and found not in (None, about[f"{name}_sha256"]):
                raise InputError(
                    f"{path}: made with another {name} model than lies beside {model_file}; run the calibration again"
                )
        if grid is not None and about["grid"] != dict(grid):
            raise InputError(
                f"{path}: made on another grid ({about['grid']}) than is configured ({dict(grid)}); "
                "merge the config of the grid that the model was trained on, with the calibration's --stride"
            )
        volumes = read_maps(Path(path).with_suffix(".nii.gz"), content["maps"])
        names = [*MAPS, *(n.removesuffix("_mean") for n in volumes if n.endswith("_mean"))]
        mean, spread = ({n: volumes[f"{n}_{kind}"] for n in names} for kind in ("mean", "spread"))
        quantiles = dict(content["quantiles"])
        if fusion is None or content["fusion"] != asdict(fusion):
            quantiles.pop("fusion", None)
        sigmas = float(content["filter_sigma"]), float(content["z_sigma"])
        return Calibration(content["contrast"], mean, spread, quantiles, *sigmas, about, fusion)
    except (KeyError, TypeError, ValueError, IndexError, OSError, EOFError, zlib.error, ImageFileError) as error:
        raise InputError(f"{path}: damaged calibration ({error!r}); run the calibration again") from error


class CalibrationFile:
    """A calibration that is read when it is first needed, so that a bundle can be looked at before it is trained.

    As a handler it reads the file when the engine starts: before the first scan, not after it.

    Args:
        path, model_file, grid, fusion: see `load_calibration`.
    """

    def __init__(
        self, path: str, model_file: str, grid: Mapping[str, Any] | None = None, fusion: Fusion | None = None
    ) -> None:
        self.path, self.model_file, self.grid, self.fusion = path, model_file, grid, fusion
        self._loaded: Calibration | None = None

    def load(self) -> Calibration:
        """The calibration; errors as of `load_calibration`."""
        if self._loaded is None:
            self._loaded = load_calibration(self.path, self.model_file, self.grid, self.fusion)
        return self._loaded

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda _: self.load())


class FitCalibration:
    """Handler: collect the anomaly channels of every scan an evaluator sees; at the end fit, save, and say so.

    Args:
        path: of the calibration (JSON).
        model_file: the model that the evaluator runs; its hash is stored.
        grid: ``spacing``, ``spatial_size``, ``center``, ``stride``; stored, and compared when the calibration is used.
        contrast, smoothing_mm, filter_mm, fusion: see `fit_calibration`.
        maps: keys of other methods' maps; those that the scans have are calibrated too.
        paper: the channels are `paper_channels`: keep the thresholds of the paper's scores, too.
    """

    def __init__(
        self,
        path: str,
        model_file: str,
        contrast: str,
        grid: Mapping[str, Any],
        smoothing_mm: float = 4.0,
        filter_mm: float = 3.0,
        fusion: Fusion | None = None,
        maps: Sequence[str] = (),
        paper: bool = False,
    ) -> None:
        self.paper = paper
        self.path, self.model_file, self.contrast, self.grid = path, model_file, contrast, dict(grid)
        self.smoothing_mm, self.filter_mm, self.fusion = smoothing_mm, filter_mm, fusion
        self.maps: dict[str, list[torch.Tensor]] = {name: [] for name in maps}
        self.channels: list[torch.Tensor] = []
        self.images: list[torch.Tensor] = []
        self.affine = np.eye(4)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda _: claim_folder(Path(self.path).parent))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def collect(self, engine: Any) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output):
            output = {**batch, **output}
            self.affine = np.asarray(output["image"].affine)
            self.channels.append(output["pred"].as_tensor().cpu())
            self.images.append(output["image"].as_tensor().cpu())
            for name, volumes in self.maps.items():
                if name in output:
                    volumes.append(output[name].as_tensor().cpu())
        print(f"calibration: {len(self.images)} healthy scans", flush=True)

    def finish(self, engine: Engine) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError("a calibration is fitted by one process: leave out the multi_gpu config")
        maps = {name: volumes for name, volumes in self.maps.items() if len(volumes) == len(self.images)}
        calibration = fit_calibration(
            self.channels,
            self.images,
            self.contrast,
            self.grid["spacing"],
            self.smoothing_mm,
            self.filter_mm,
            {
                "chain": CHAIN,
                "model_sha256": model_hash(self.model_file, self.contrast),
                **{f"{k}_sha256": v for k, v in map_hashes(self.model_file, self.contrast).items()},
                "grid": self.grid,
                "smoothing_mm": self.smoothing_mm,
                "filter_mm": self.filter_mm,
            },
            maps,
            self.fusion,
            load_normative(normative_file(Path(self.model_file).parent, self.contrast)),
        )
        if self.paper:
            paper = paper_quantiles(self.channels, self.images, QUANTILES)
            calibration = replace(calibration, quantiles={**calibration.quantiles, **paper})
        affine = coarse_affine(self.affine, coarsening(self.grid["spacing"]))
        save_calibration(calibration, self.path, affine)
        record_run(Path(self.path).parent, f"calibration {self.contrast}", [self.model_file])
        print(
            f"{self.path}: fitted to {len(self.images)} scans; 99 % of healthy brain voxels score below "
            f"{calibration.threshold('location', 0.99):.2f}",
            flush=True,
        )
