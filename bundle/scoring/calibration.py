"""Calibration: healthy scans that nobody was trained on make the maps of what is usual, and the thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from bundle.command_line import record_run
from bundle.data.datalist import CHAIN
from bundle.data.files import claim_folder
from bundle.data.own_volume import own_voxel_mm3
from bundle.data.population import coarse_affine, coarsen, coarsening, population_maps
from bundle.errors import InputError
from bundle.shards import Records
from bundle.transforms.normative import (
    ALL,
    MATCHING,
    MEAN_MM,
    SPREAD_MM,
    NormativeMap,
    as_range,
    load_normative,
    normative_file,
)

from .anomaly import smooth_inside
from .calibration_file import map_hashes, model_hash, save_calibration
from .fusion import Fusion
from .operating import operating_points
from .paper import paper_quantiles
from .scores import FILTER_MM, LESION_SIGN, OTHER_MM, OWN_MAPS, SCORES, Calibration, raw_maps

QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
# edge of the blocks that the maps are kept in: as wide as their smoothing
LATTICE_MM = 4.0


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
    persons: Sequence[str] | None = None,
    voxel_mm3: Sequence[float] | None = None,
    location: Sequence[str] = SCORES["location"].maps,
    telling: tuple[float, float] = ALL,
) -> Calibration:
    """Fit maps and thresholds to healthy scans.

    The thresholds come from scores of each person's scans under maps of the others: a scan is closer to maps that it
    helped to make, and a threshold taken from there would be too low for a new person.

    Args:
        channels: per scan, anomaly channels ``[2, H, W, D]``.
        images: per scan, normalised intensities ``[1, H, W, D]``, 0 outside the brain.
        contrast: one of `LESION_SIGN`.
        spacing: of the grid, mm; maps are kept at 4 mm where that is coarser.
        smoothing_mm: sigma of the Gaussian over the maps.
        filter_mm: sigma of the Gaussian over the anomaly channels and the embedding of each scan; other maps have their
            own, see `FILTER_MM`.
        provenance, fusion, location, telling: see `Calibration`; of the location's maps those that there are, or error
            and variance.
        maps: of other methods: name -> per scan ``[1, H, W, D]``.
        normative: mean and spread of the intensity, from other scans than these; None: from these.
        persons: whose each scan is; None: each another's.
        voxel_mm3: of the person's own volume in a voxel of each scan; None: as much as on the grid.

    Raises:
        InputError: scans of fewer than three subjects, or an unknown contrast; a map of a name that is taken.
    """
    persons = list(persons or map(str, range(len(images))))
    if len(set(persons)) < 3:
        raise InputError(f"calibration needs healthy scans of at least 3 subjects, got {len(set(persons))}")
    if contrast not in LESION_SIGN:
        raise InputError(f"contrast '{contrast}' is unknown: use one of {', '.join(LESION_SIGN)}")
    maps = maps or {}
    taken = {"fusion", *OWN_MAPS, *(n for n, score in SCORES.items() if score.maps != (n,))} & set(maps)
    if taken:
        raise InputError(f"fusion_maps: '{taken.pop()}' is the name of a map of our own; choose another")
    factor = coarsening(spacing, LATTICE_MM)
    sigma = smoothing_mm / (spacing * factor)
    of_location = set(SCORES["location"].maps)
    sigmas = {
        name: (filter_mm if name in of_location else FILTER_MM.get(name, OTHER_MM)) / spacing
        for name in (*OWN_MAPS, *maps)
    }
    if normative is None:
        normative = _own_normative(images, spacing)
    insides = [image > 0 for image in images]
    filtered: list[dict[str, torch.Tensor]] = []
    for i, inside in enumerate(insides):
        own = {name: volumes[i] for name, volumes in maps.items()}
        raw = raw_maps(channels[i], images[i], own, contrast, normative, telling)
        filtered.append({name: smooth_inside(volume, inside, sigmas[name]) for name, volume in raw.items()})
    wanted, location = location, [name for name in location if name in sigmas]
    if not location:
        location = list(SCORES["error_and_variance"].maps)
        print(f"location: there is no {' or '.join(wanted)}; it is made of error and variance instead", flush=True)
    names = [name for name, score in SCORES.items() if name == "location" or set(score.maps) <= set(sigmas)]
    names += [name for name in maps if name not in SCORES]
    sums = {"location": location} | {n: list(SCORES[n].maps) for n in names if n in SCORES and n != "location"}
    by_place = {n: parts for n, parts in sums.items() if SCORES[n].by_place}
    single = dict.fromkeys([*(m for parts in by_place.values() for m in parts), *(n for n in names if n not in SCORES)])
    coarse = {
        m: torch.stack([coarsen(volumes[m], inside, factor) for volumes, inside in zip(filtered, insides)])
        for m in single
    }

    def fit(rows: list[int]) -> Calibration:
        fitted = {m: population_maps(values[rows], sigma) for m, values in coarse.items()}
        for name, parts in by_place.items():
            if len(parts) > 1:
                total = torch.stack([(coarse[m][rows] - fitted[m][0]) / fitted[m][1] for m in parts]).sum(0)
                fitted[name] = population_maps(total, sigma)
        mean, spread = ({n: pair[k] for n, pair in fitted.items()} for k in (0, 1))
        return Calibration(
            contrast, mean, spread, {}, sigmas, {}, normative, fusion, location=tuple(location), telling=telling
        )

    everyone = range(len(images))
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in (*names, *(["fusion"] if fusion else []))}
    others = {p: fit([j for j in everyone if persons[j] != p]) for p in dict.fromkeys(persons)}
    for i in everyone:
        for name, values in scores.items():
            values.append(others[persons[i]].score_filtered(name, filtered[i], insides[i]))
    brains = [inside[0].numpy() for inside in insides]
    volumes = voxel_mm3 or [spacing**3] * len(images)
    keys = [f"{q:g}" for q in QUANTILES]
    quantiles, points = {}, {}
    for name, values in scores.items():
        heatmaps = [value[0].numpy() for value in values]
        # of each scan, and then the median of them: pooled, one odd scan would set everybody's threshold
        typical = np.median([np.quantile(h[b], QUANTILES) for h, b in zip(heatmaps, brains)], 0)
        quantiles[name] = dict(zip(keys, typical.astype(float).tolist()))
        points[name] = operating_points(heatmaps, brains, volumes)
    about = {"subjects": len(images), "people": len(others), **(provenance or {})}
    return replace(fit(list(everyone)), quantiles=quantiles, points=points, provenance=about)


def _own_normative(images: Sequence[torch.Tensor], spacing: float) -> NormativeMap:
    """Of the very scans that are calibrated."""
    factor = coarsening(spacing)
    values = torch.stack([coarsen(image, image > 0, factor) for image in images])
    maps = population_maps(values, MEAN_MM / (spacing * factor), SPREAD_MM / (spacing * factor))
    return NormativeMap(*maps, (~values.isnan()).float().mean(0, keepdim=True))


class FitCalibration:
    """Handler: collect the anomaly channels of every scan a `ScanEvaluator` sees; at the end fit, save, and say so.

    Args:
        path: of the calibration (JSON).
        model_file: the model that the evaluator runs; its hash is stored.
        grid: ``spacing``, ``spatial_size``, ``center``, ``stride``; stored, and compared when the calibration is used.
        contrast, smoothing_mm, filter_mm, fusion, location, telling: see `fit_calibration`.
        maps: keys of other methods' maps; those that the scans have are calibrated too.
        paper: the channels are `paper_channels`: keep the thresholds of the paper's scores, too.
        records: of all scans; while other shards have some to do, nothing is fitted.

    Raises:
        InputError: a scan that fails; several processes of ``torchrun``; ``telling`` is no range.
    """

    def __init__(
        self,
        path: str,
        model_file: str,
        contrast: str,
        grid: Mapping[str, Any],
        records: Records,
        smoothing_mm: float = 4.0,
        filter_mm: float = 3.0,
        fusion: Fusion | None = None,
        maps: Sequence[str] = (),
        paper: bool = False,
        location: Sequence[str] = SCORES["location"].maps,
        telling: Sequence[float] = ALL,
    ) -> None:
        self.path, self.model_file, self.contrast, self.grid = path, model_file, contrast, dict(grid)
        self.smoothing_mm, self.filter_mm, self.fusion = smoothing_mm, filter_mm, fusion
        self.paper, self.location = paper, location
        self.telling = as_range(telling, f"asymmetry_intensity of {contrast}")
        self.maps, self.records = maps, records

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda _: claim_folder(Path(self.path).parent, self.records.shard))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def collect(self, engine: Any) -> None:
        for output in engine.state.output:
            if "failure" in output:
                raise InputError(f"{output['name']}: {output['failure']}")
        for batch, output in zip(engine.state.batch, engine.state.output):
            output = {**batch, **output}
            volumes = {"channels": "pred", "image": "image", **{name: name for name in self.maps if name in output}}
            content = {name: output[key].as_tensor().cpu().contiguous() for name, key in volumes.items()}
            content["affine"] = np.asarray(output["image"].affine)
            content["voxel_mm3"] = own_voxel_mm3(output["image"], output.get("to_atlas"))
            content["person"] = str(output.get("person") or output.get("subject") or output["name"])
            self.records.write(output, content)
            print(f"calibration: {engine.state.iteration} healthy scans", flush=True)

    def finish(self, engine: Engine) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError("a calibration is fitted by one process: leave out the multi_gpu config")
        scans = self.records.all()
        if scans is None:
            return
        channels, images, persons, voxel_mm3 = (
            [scan[key] for scan in scans] for key in ("channels", "image", "person", "voxel_mm3")
        )
        maps = {name: [scan[name] for scan in scans] for name in self.maps if all(name in scan for scan in scans)}
        provenance = {
            "chain": CHAIN,
            "matching": MATCHING,
            "model_sha256": model_hash(self.model_file, self.contrast),
            **map_hashes(self.model_file, self.contrast),
            "grid": self.grid,
            "smoothing_mm": self.smoothing_mm,
            "filter_mm": self.filter_mm,
        }
        calibration = fit_calibration(
            channels,
            images,
            self.contrast,
            self.grid["spacing"],
            self.smoothing_mm,
            self.filter_mm,
            provenance,
            maps,
            self.fusion,
            load_normative(normative_file(Path(self.model_file).parent, self.contrast)),
            persons,
            voxel_mm3,
            self.location,
            self.telling,
        )
        if self.paper:
            paper = paper_quantiles(channels, images, QUANTILES)
            calibration = replace(calibration, quantiles={**calibration.quantiles, **paper})
        affine = coarse_affine(scans[-1]["affine"], coarsening(self.grid["spacing"], LATTICE_MM))
        save_calibration(calibration, self.path, affine)
        record_run(Path(self.path).parent, f"calibration {self.contrast}", [self.model_file])
        points = ", ".join(
            f"{n} {t:.2f}" for n, t in calibration.points["fusion" if self.fusion else "location"].items()
        )
        print(f"{self.path}: fitted to {len(scans)} scans; thresholds: {points}", flush=True)
