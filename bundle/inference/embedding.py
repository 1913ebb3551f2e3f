"""How unusual the localiser's embedding of a patch is at its place.

The localiser knows what belongs where, so its features tell more of a patch than where it may lie. The map is their
Mahalanobis distance from those of healthy people at the same place (as PaDiM has it, Defard et al., arXiv 2011.08785).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from torch import nn

from bundle.data.datalist import CHAIN
from bundle.data.files import alone_in, claim_folder, of_contrast, read_json, write_json
from bundle.data.population import coarse_affine, coarsening, read_maps, write_maps
from bundle.errors import InputError
from bundle.networks import load_weights
from bundle.parallel import Shard
from bundle.scoring import require_model
from bundle.scoring.calibration_file import DAMAGE, model_hash
from bundle.transforms.normative import ALL, MATCHING, as_range, hold
from bundle.transforms.sampling import slice_position

if TYPE_CHECKING:
    from .inferer import PatchLocationInferer

COMPONENTS = 16
# edges of the blocks that mean and covariance are kept in, and sigmas of the Gaussians over them
_MEAN_EDGE_MM, _MEAN_MM, _COVARIANCE_EDGE_MM, _COVARIANCE_MM = 4.0, 4.0, 12.0, 10.0
# share of the whole brain's covariance that is added everywhere, and how many voxels it counts as where there are few
_SHRINKAGE, _PRIOR_VOXELS = 0.05, 5.0
# patches of each of the first scans that the components are found from
_PATCHES, _FIRST_SCANS = 5000, 8
_FEWEST = 3  # scans that a covariance is found from


@dataclass(frozen=True)
class Embedding:
    """Healthy features in atlas space.

    Attributes:
        center: ``[F]``, the mean of healthy patches.
        projection: ``[F, K]``, principal components.
        mean: ``[K, h, w, d]``, at every place, of the scans' extent.
        whitening: ``[K, K, i, j, k]``, triangular matrices that make the covariance of a block 1.
        edge: of these blocks, voxels of the grid.
        telling: lowest and highest intensity that were told apart, see `hold`.
    """

    center: torch.Tensor
    projection: torch.Tensor
    mean: torch.Tensor
    whitening: torch.Tensor
    edge: int
    telling: tuple[float, float] = ALL

    def distance(self, components: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Mahalanobis distance ``[1, H, W, D]``, 0 outside the brain, of ``components`` ``[K, H, W, D]`` (projected
        features); ``inside`` ``[1, H, W, D]`` bool.
        """
        size = components.shape[1:]
        mean = F.interpolate(self.mean[None].to(components), size, mode="trilinear", align_corners=False)[0]
        off = components[:, inside[0]].T - mean[:, inside[0]].T
        blocks, order = _block_of(inside[0], self.edge).sort()
        numbers, counts = blocks.unique_consecutive(return_counts=True)
        matrices = self.whitening.flatten(2).permute(2, 1, 0).to(components)
        # block by block, each a product of two matrices: a matrix for every voxel would be copied otherwise
        white = [values @ matrices[n] for n, values in zip(numbers.tolist(), off[order].split(counts.tolist()))]
        distance = torch.empty_like(off[:, 0])
        distance[order] = torch.cat(white).square().sum(1).sqrt()
        result = torch.zeros(size, device=components.device)
        result[inside[0]] = distance
        return result[None]


class Components(nn.Module):
    """A localiser that gives the projected features of its patches, ``[B, K, H', W']``.

    Args:
        network: has ``embed`` and ``locate``, see `PatchLocator`.
        center, projection, telling: of an `Embedding`.
        behind: give them behind the network's own channels, ``[B, 4 + K, H', W']``, instead of alone.
    """

    def __init__(
        self,
        network: nn.Module,
        center: torch.Tensor,
        projection: torch.Tensor,
        telling: Sequence[float] = ALL,
        behind: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.center, self.projection = network, center, projection
        self.telling, self.behind = telling, behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = torch.cat([hold(x[:, :1], self.telling), x[:, 1:]], 1)
        features = self.network.embed(held)  # type: ignore[operator]
        weight = self.projection.T[:, :, None, None].to(features)
        components = F.conv2d(features.float(), weight.float(), -(self.center @ self.projection).to(features).float())
        if not self.behind:
            return components
        # the heads see what they were trained on
        own = features if torch.equal(held, x) else self.network.embed(x)  # type: ignore[operator]
        return torch.cat([self.network.locate(own), components], 1)  # type: ignore[operator]


def _block_of(inside: torch.Tensor, edge: int) -> torch.Tensor:
    """For every voxel of ``inside`` ``[H, W, D]``, the number of the block of ``edge`` cubed voxels that it lies in."""
    i, j, k = (torch.nonzero(inside) // edge).unbind(1)
    _, w, d = _blocks(inside.shape, edge)
    return (i * w + j) * d + k


def _blocks(shape: Sequence[int], edge: int) -> list[int]:
    return [-(-n // edge) for n in shape]


def principal_components(
    volumes: Sequence[torch.Tensor], network: nn.Module, patch_size: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``[F]`` and first principal components ``[F, K]`` of the features of random patches.

    Args:
        volumes: normalised ``[H, W, D]``, 0 outside the brain.
        network: has ``embed``, see `PatchLocator`.
        patch_size: of the network.
        device: of the network.
    """
    generator = torch.Generator().manual_seed(0)
    before = patch_size // 2
    features = []
    for volume in volumes:
        padded = F.pad(volume.permute(2, 0, 1), (before, patch_size - 1 - before) * 2)
        patches = padded.unfold(1, patch_size, 1).unfold(2, patch_size, 1)
        centres = torch.nonzero(volume > 0)
        for chosen in centres[torch.randperm(len(centres), generator=generator)[:_PATCHES]].split(1000):
            i, j, k = chosen.unbind(1)
            image = patches[k, i, j][:, None]
            plane = slice_position(k.to(volume.dtype), volume.shape[2]).view(-1, 1, 1, 1).expand_as(image)
            with torch.no_grad():
                features.append(network.embed(torch.cat([image, plane], 1).to(device))[..., 0, 0].cpu().float())  # type: ignore[operator]
    values = torch.cat(features).double()
    center = values.mean(0)
    _, _, axes = torch.linalg.svd((values - center).T @ (values - center))
    return center.float(), axes[:COMPONENTS].T.float().contiguous()


class FeatureMoments:
    """Sums over people of components and of their products, in blocks of the grid: all that is kept of the scans.

    Args:
        shape: of the grid, ``[H, W, D]``.
        spacing: mm.
        number: of components.
    """

    def __init__(self, shape: Sequence[int], spacing: float, number: int) -> None:
        self.spacing, self.edge = spacing, coarsening(spacing, _MEAN_EDGE_MM)
        self.blocks = _blocks(shape, self.edge)
        n = int(np.prod(self.blocks))
        self.count, self.sum = torch.zeros(n), torch.zeros(n, number)
        self.products = torch.zeros(n, number, number)

    def add(self, components: torch.Tensor, inside: torch.Tensor) -> None:
        """One scan: ``[K, H, W, D]``, and its brain ``[1, H, W, D]`` (bool)."""
        values, blocks = components[:, inside[0]].T, _block_of(inside[0], self.edge)
        self.count.index_add_(0, blocks, torch.ones(len(blocks)))
        self.sum.index_add_(0, blocks, values)
        for block, v in zip(blocks.split(2**14), values.split(2**14)):
            self.products.index_add_(0, block, v[:, :, None] * v[:, None, :])

    def fit(self, center: torch.Tensor, projection: torch.Tensor) -> Embedding:
        """Smoothed mean, and the covariance around it, smoothed more and drawn towards the whole brain's."""
        number = self.sum.shape[1]

        def smooth(volume: torch.Tensor, mm: float, edge: int) -> torch.Tensor:
            """``[C, h, w, d]``"""
            sigma = mm / (self.spacing * edge)
            return torch.stack(
                [torch.as_tensor(ndimage.gaussian_filter(v, sigma, mode="constant")) for v in volume.numpy()]
            )

        def volume(table: torch.Tensor) -> torch.Tensor:
            return table.flatten(1).T.reshape(-1, *self.blocks)

        weight = smooth(volume(self.count[:, None]), _MEAN_MM, self.edge).clamp(min=1e-3)
        mean = smooth(volume(self.sum), _MEAN_MM, self.edge) / weight
        at = mean.flatten(1).T
        cross = self.sum[:, :, None] * at[:, None, :]
        products = (
            self.products - cross - cross.transpose(1, 2) + self.count[:, None, None] * at[:, :, None] * at[:, None]
        )
        overall = products.sum(0) / self.count.sum()
        factor = coarsening(self.spacing * self.edge, _COVARIANCE_EDGE_MM)

        def pooled(table: torch.Tensor) -> torch.Tensor:
            sums = F.avg_pool3d(volume(table)[None], factor, ceil_mode=True, divisor_override=1)[0]
            return smooth(sums, _COVARIANCE_MM, self.edge * factor)

        total, count = pooled(products), pooled(self.count[:, None])
        prior = overall.view(-1, 1, 1, 1)
        covariance = (total + _PRIOR_VOXELS * prior) / (count + _PRIOR_VOXELS) + _SHRINKAGE * prior
        size = covariance.shape[1:]
        matrices = covariance.flatten(1).T.view(-1, number, number).double()
        matrices = matrices + 1e-6 * overall.diagonal().mean() * torch.eye(number)
        whitening = torch.linalg.inv(torch.linalg.cholesky(matrices)).float()
        return Embedding(
            center, projection, mean, whitening.permute(1, 2, 0).reshape(number, number, *size), self.edge * factor
        )


def fit_embedding(
    dataset: Sequence[Mapping[str, Any]],
    network: nn.Module,
    inferer: PatchLocationInferer,
    path: str | Path,
    model_file: str | Path,
    contrast: str,
    grid: Mapping[str, Any],
    device: torch.device | str = "cpu",
    shard: str = "",
    telling: Sequence[float] = ALL,
) -> None:
    """Fit an `Embedding` to healthy scans, one after the other, and write it, unless that of the same scans, model and
    range lies there already: of several shards the first does it, and the others wait. Does nothing for a network
    without ``embed``, or with fewer than three scans.

    Args:
        dataset: ``image`` ``[1, H, W, D]``, normalised: of other people than those of the calibration.
        network: the localiser; its weights are read from ``model_file``.
        inferer: gives the network's channels as they are (``output="location"``).
        path: of the JSON file; ``_mean.nii.gz`` and ``_whitening.nii.gz`` lie beside it.
        model_file, contrast: of the model; its hash is stored.
        grid: ``spacing``; all is stored.
        device: of the network.
        shard: of the run, see `bundle.parallel.Shard`.
        telling: lowest and highest intensity that are told apart, see `hold`.

    Raises:
        InputError: there is no model; a range that is none.
    """
    require_model(model_file)
    telling = as_range(telling, f"telling_intensity of {contrast}")
    if not hasattr(network, "embed"):
        return
    if len(dataset) < _FEWEST:
        print(f"no embedding: it needs at least {_FEWEST} healthy scans, got {len(dataset)}", flush=True)
        return
    claim_folder(Path(path).parent, Shard.of(shard))
    with alone_in(Path(path).parent):
        _fit(dataset, network, inferer, Path(path), model_file, contrast, grid, device, telling)


def _fit(
    dataset: Sequence[Mapping[str, Any]],
    network: nn.Module,
    inferer: PatchLocationInferer,
    path: Path,
    model_file: str | Path,
    contrast: str,
    grid: Mapping[str, Any],
    device: torch.device | str,
    telling: tuple[float, float],
) -> None:
    listed = [str(item.get("image")) for item in getattr(dataset, "data", [])]
    made_of = [model_hash(model_file, contrast), MATCHING, dict(grid), listed, *telling]
    made_from = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    if listed and _is_whole(path, model_file, made_from):
        print(f"{path}: of the same model, range and scans already", flush=True)
        return
    load_weights(network, model_file)
    network.eval()
    volumes = [dataset[i]["image"].as_tensor().cpu()[0] for i in range(min(len(dataset), _FIRST_SCANS))]
    center, projection = principal_components([hold(v, telling) for v in volumes], network, inferer.patch_size, device)
    components = Components(network, center, projection, telling)
    moments = FeatureMoments(volumes[0].shape, float(grid["spacing"]), projection.shape[1])
    for i in range(len(dataset)):
        scan = dataset[i]["image"]
        moments.add(inferer(scan.as_tensor()[None].to(device), components)[0].cpu(), scan.as_tensor().cpu() > 0)
        print(f"embedding: {i + 1} of {len(dataset)} healthy scans", flush=True)
    affine, facts = np.asarray(scan.affine), {"subjects": i + 1, "made_from": made_from}
    embedding = replace(moments.fit(center, projection), telling=telling)
    write_embedding(embedding, path, model_file, contrast, grid, affine, facts)


def _is_whole(path: Path, model_file: str | Path, made_from: str) -> bool:
    """Whether an embedding that was made from that lies there, with all its files."""
    try:
        if read_json(path, "embedding").get("made_from") != made_from:
            return False
        load_embedding(path, model_file)
    except InputError:
        return False
    return True


def write_embedding(
    embedding: Embedding,
    path: str | Path,
    model_file: str | Path,
    contrast: str,
    grid: Mapping[str, Any],
    affine: np.ndarray,
    facts: Mapping[str, Any],
) -> None:
    """Write what `load_embedding` reads, and ``facts`` beside it; ``affine`` of the grid, voxel to atlas mm."""
    path = Path(path)
    rows, columns = np.tril_indices(embedding.mean.shape[0])
    means = {f"mean{k}": m[None] for k, m in enumerate(embedding.mean)}
    matrices = {f"{i},{j}": embedding.whitening[i, j][None] for i, j in zip(rows, columns)}
    edges = coarsening(float(grid["spacing"]), _MEAN_EDGE_MM), embedding.edge
    index = [
        write_maps(_beside(path, kind), maps, coarse_affine(affine, edge))
        for kind, maps, edge in zip(("mean", "whitening"), (means, matrices), edges)
    ]

    def numbers(values: torch.Tensor) -> Any:
        return np.vectorize(lambda v: float(f"{v:.5g}"))(values.numpy()).tolist()

    content = {
        "contrast": contrast,
        "chain": CHAIN,
        "model_sha256": model_hash(model_file, contrast),
        **facts,
        "grid": dict(grid),
        "edge": embedding.edge,
        **({} if embedding.telling == ALL else {"telling": embedding.telling}),
        "center": numbers(embedding.center),
        "projection": numbers(embedding.projection),
        "mean": index[0],
        "whitening": index[1],
    }
    write_json(path, content)


def _beside(path: str | Path, kind: str) -> Path:
    return Path(path).with_name(f"{Path(path).stem}_{kind}.nii.gz")


def load_embedding(path: str | Path, model_file: str | Path) -> Embedding:
    """Read what `write_embedding` wrote.

    Raises:
        InputError: missing, damaged, or made with another model.
    """
    content = read_json(path, "embedding (make it with: run calibration)")
    try:
        if content.get("chain") != CHAIN or content["model_sha256"] != model_hash(model_file, content["contrast"]):
            raise InputError(
                f"{path}: made with another model than {model_file}; run the calibration with --with_embedding True, "
                "or remove it"
            )
        means = read_maps(_beside(path, "mean"), content["mean"])
        matrices = read_maps(_beside(path, "whitening"), content["whitening"])
        mean = torch.cat(list(means.values()))
        whitening = torch.zeros(len(mean), len(mean), *matrices["0,0"].shape[1:])
        for name, values in matrices.items():
            i, j = map(int, name.split(","))
            whitening[i, j] = values[0]
        center, projection = (torch.tensor(content[key], dtype=torch.float32) for key in ("center", "projection"))
        lowest, highest = map(float, content.get("telling", ALL))
        return Embedding(center, projection, mean, whitening, int(content["edge"]), (lowest, highest))
    except DAMAGE as error:
        raise InputError(
            f"{path}: damaged embedding ({error!r}); run the calibration with --with_embedding True, or remove it"
        ) from error


class EmbeddingMapd(MapTransform):
    """Add the distance of the localiser's features from healthy ones at their place (`Embedding.distance`). Adds
    nothing where no embedding lies beside the model.

    Args:
        keys: normalised volume ``[1, H, W, D]``, 0 outside the brain (one key).
        network: the localiser; its weights are read from ``model_file`` when the first scan comes.
        inferer: gives the network's channels as they are (``output="location"``).
        model_file: of the localiser; of the contrast "auto" each scan's own (`of_contrast`).
        embedding_file: of `fit_embedding`; likewise.
        device: to run on.
        output_key: where the distance ``[1, H, W, D]`` goes.
        pred_key: what the main inferer has given, ``[C, H, W, D]``: if the components are among it, behind two anomaly
            channels, the network is not run.

    Raises:
        InputError: an embedding that cannot be read, or of another model; a network that has none.
    """

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        inferer: PatchLocationInferer,
        model_file: str,
        embedding_file: str,
        device: torch.device | str = "cpu",
        output_key: str = "embedding",
        pred_key: str = "pred",
    ) -> None:
        super().__init__(keys)
        self.network, self.inferer, self.model_file, self.device = network, inferer, model_file, device
        self.embedding_file, self.output_key, self.pred_key = embedding_file, output_key, pred_key
        self._embedding: Embedding
        self._loaded = self._network_file = ""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        file, model_file = (of_contrast(path, d.get("contrast")) for path in (self.embedding_file, self.model_file))
        if self._loaded != file:
            if not Path(file).is_file():
                return d
            if not hasattr(self.network, "embed"):
                raise InputError(f"{file}: a {type(self.network).__name__} has no embedding")
            self._embedding, self._loaded = load_embedding(file, model_file), file
        found, image = self._embedding, d[self.keys[0]]
        volume = image.as_tensor().float()
        components = d[self.pred_key][2:].as_tensor() if self.pred_key in d else volume[:0]
        if not len(components):
            components = self._run(volume, model_file, found)
        distance = found.distance(components.cpu(), volume.cpu() > 0)
        d[self.output_key] = MetaTensor(distance).copy_meta_from(image)
        return d

    def _run(self, volume: torch.Tensor, model_file: str, found: Embedding) -> torch.Tensor:
        """The components of a volume by the network, once more."""
        if self._network_file != model_file:
            load_weights(self.network, model_file)
            self.network.to(self.device).eval()
            self._network_file = model_file
        network = Components(self.network, found.center, found.projection, found.telling).to(self.device)
        return self.inferer(volume[None].to(self.device), network)[0]
