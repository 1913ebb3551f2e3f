"""From a volume and the network to the anomaly channels of every voxel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.handlers import CheckpointLoader
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_dst_type

from bundle.data.files import CONTRASTS, of_contrast
from bundle.errors import InputError
from bundle.networks import load_weights
from bundle.scoring import CalibrationFile, anomaly_channels, fill_outside, require_model
from bundle.scoring.paper import near, paper_channels
from bundle.transforms.sampling import patch_centers, slice_position

from .embedding import Components, load_embedding
from .precision import autocast

_FEWEST_POSITIONS = 512  # smaller chunks than that are a matter of what else is in the memory


class WeightsCheckpointLoader(CheckpointLoader):
    """MONAI's `CheckpointLoader` for weights alone: a flat state dict, read with ``weights_only``, strictly. Of the
    contrast "auto" it reads none: the inferer does, by the scan.

    Args:
        load_path: its file.
        load_dict: the network, under any one name.

    Raises:
        InputError: when the engine starts: there is no such file, or it is damaged, of another network, or holds more
            than numbers.
    """

    def __call__(self, engine: Any) -> None:
        (network,) = self.load_dict.values()
        if of_contrast(self.load_path, CONTRASTS[0]) != str(self.load_path):
            return
        require_model(self.load_path)
        load_weights(network, self.load_path)


class AutocastInferer(SimpleInferer):
    """`SimpleInferer` in bfloat16 autocast, on whatever device the inputs are: MONAI's trainers know it on CUDA only,
    and scale the loss there, which bfloat16 does not need. Gives float32, in which losses are summed.

    Args:
        enabled: False runs as `SimpleInferer` does; "auto" is for devices that compute in bfloat16, see `autocast`.

    Raises:
        InputError: neither of these.
    """

    def __init__(self, enabled: bool | str = True) -> None:
        super().__init__()
        if enabled not in (True, False, "auto"):
            raise InputError(f"--amp {enabled} is unknown: use True, False or auto")
        self.precision = "auto" if enabled == "auto" else "bfloat16" if enabled else "float32"

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        with autocast(self.precision, inputs.device):
            return super().__call__(inputs, network, *args, **kwargs).float()


class PatchLocationInferer(Inferer):
    """Localise the patch around every brain voxel and return its anomaly channels.

    A voxel's patch is the one that starts ``patch_size // 2`` voxels before it in both directions; slices are padded
    with background, so that voxels at the rim of the grid have theirs too. Brain is where the intensity is above 0
    (see `NormalizeBrainIntensityd`); only the slices and the bounding boxes that hold brain are run.

    Args:
        patch_size: receptive field of the network, voxels.
        stride: of the network's output, voxels. Above 1, only every ``stride``-th row and column is evaluated, and
            what is predicted there is interpolated bilinearly in between.
        max_positions: patches evaluated at once; bounds the memory, whatever the size of the volume.
        precision: "float32", "bfloat16" or "auto", see `autocast`.
        output: "anomaly" gives log squared error and log variance ``[B, 2, H, W, D]``, voxels outside the brain set to
            the lowest score inside; "location" gives the network's channels, four or any number, as they are, 0 outside
            the brain; "paper" gives `paper_channels`, outside the brain too as far as the paper's score needs them.
        whole_slices: run slices as they are, one by one, all of one size: for engines that are compiled for a shape.
            Otherwise only the bounding boxes that hold brain are run.
        model_file: weights (a flat state dict) that are put into the network before its first volume. MONAI's runner
            does that by itself; MONAI Label hands over the weights of ``model.pt``, whatever the contrast. Of the
            contrast "auto": those of the ``contrast`` in each volume's ``meta``, which `TellContrastd` writes.
        embedding_file: of `fit_embedding`; likewise. Where there is one, the components of the embedding follow behind
            the anomaly channels, ``[B, 2 + K, H, W, D]``: one call serves both (`EmbeddingMapd`).
        score, calibration: that is going to be made, of what; None: any. What it does not need is left at 0 and costs
            no time: the network's heads, its components, or the network itself.

    Raises:
        InputError: weights that cannot be read or are of another network.
        ValueError: an unknown ``precision`` or ``output``; an input that is not ``[B, 1, H, W, D]``, or has no brain;
            a network of another stride.
    """

    def __init__(
        self,
        patch_size: int = 24,
        stride: int = 1,
        max_positions: int = 2**15,
        precision: str = "float32",
        output: str = "anomaly",
        whole_slices: bool = False,
        model_file: str | None = None,
        embedding_file: str | None = None,
        score: str | None = None,
        calibration: CalibrationFile | None = None,
    ) -> None:
        super().__init__()
        autocast(precision, "cpu")  # an unknown one is told at once
        if output not in ("anomaly", "location", "paper"):
            raise ValueError(f"unknown output '{output}'")
        self.patch_size, self.stride, self.max_positions = patch_size, stride, max_positions
        self.precision, self.output = precision, output
        self.whole_slices, self.model_file, self.embedding_file = whole_slices, model_file, embedding_file
        self.score, self.calibration = score, calibration
        self._loaded: tuple[Any, str, str] = (None, "", "")
        self._with_components: Any = None

    @torch.no_grad()
    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Args: inputs ``[B, 1, H, W, D]`` normalised intensities; network as `PatchLocator`, of this stride."""
        if inputs.ndim != 5 or inputs.shape[1] != 1:
            raise ValueError(f"expected volumes [B, 1, H, W, D], got {tuple(inputs.shape)}")
        volumes = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        told = getattr(inputs, "meta", {}).get("contrast")
        results = []
        for volume, contrast in zip(volumes, told if isinstance(told, list) else [told] * len(volumes)):
            results.append(self._with_what_memory_there_is(volume[0], self._of_contrast(network, contrast)))
        return convert_to_dst_type(torch.stack(results), inputs)[0]

    def _of_contrast(self, network: Any, contrast: str | None) -> Any:
        """The network with the weights of the contrast; gives the components too, where there is an embedding. None
        where the score needs neither.
        """
        files = [f and of_contrast(f, contrast) for f in (self.model_file, self.embedding_file)]
        model_file, embedding_file = (f or "" for f in files)
        if self._loaded != (network, model_file, embedding_file):
            if model_file:
                load_weights(network, model_file)
            self._with_components = None
            if hasattr(network, "embed") and model_file and Path(embedding_file).is_file():
                found = load_embedding(embedding_file, model_file)
                self._with_components = Components(network, found.center, found.projection, found.telling)
            self._loaded = network, model_file, embedding_file
        components = self._with_components
        needed = {"variance", "embedding"}
        if self.calibration is not None and self.score is not None:
            needed = self.calibration.load(contrast).needed_maps(self.score)
        located, embedded = bool(needed & {"squared_error", "variance"}), "embedding" in needed
        if components is None or not embedded:
            return network if located else None
        components.behind = located
        return components

    def _with_what_memory_there_is(self, volume: torch.Tensor, network: Any) -> torch.Tensor:
        """`_volume`; where the GPU's memory runs out, in ever smaller chunks, and at last on the CPU. What fits once is
        kept for the volumes to come.
        """
        while True:
            try:
                return self._volume(volume, network)
            except torch.cuda.OutOfMemoryError:
                if self.max_positions <= _FEWEST_POSITIONS:
                    break
                self.max_positions //= 4
                warnings.warn(f"GPU memory exhausted: going on with chunks of {self.max_positions} patches")
        warnings.warn("GPU memory exhausted: this scan is done on the CPU, which takes longer")
        device = volume.device
        try:
            return self._volume(volume.cpu(), network.cpu()).to(device)
        finally:
            network.to(device)

    def _volume(self, volume: torch.Tensor, network: Any) -> torch.Tensor:
        """``[H, W, D]`` to ``[channels, H, W, D]``."""
        inside = volume > 0
        if not inside.any():
            raise ValueError("the volume holds no brain (no intensity above 0)")
        if network is None:
            return volume.new_zeros(2, *volume.shape)
        h, w, d = volume.shape
        p, s, before = self.patch_size, self.stride, self.patch_size // 2
        # every voxel with its whole patch, and up to s - 1 voxels more, for the positions behind the last voxel
        padded = F.pad(volume.permute(2, 0, 1), (before, p - 2 - before + s, before, p - 2 - before + s))
        result = volume.new_zeros(0, h, w, d)
        for slices, (r0, r1), (c0, c1) in self._tiles(near(inside) if self.output == "paper" else inside):
            rows, cols = ((-(-(b - a - 1) // s)) * s + p for a, b in ((r0, r1), (c0, c1)))
            image = padded[slices, r0 : r0 + rows, c0 : c0 + cols][:, None]
            plane = slice_position(slices.to(volume.dtype), d).view(-1, 1, 1, 1).expand_as(image)
            with autocast(self.precision, volume.device):
                pred = network(torch.cat([image, plane], 1))
            if pred.shape[2:] != ((rows - p) // s + 1, (cols - p) // s + 1):
                raise ValueError(f"the network's stride is not the inferer's, {s}")
            if s > 1:
                size = [(n - 1) * s + 1 for n in pred.shape[2:]]
                pred = F.interpolate(pred.float(), size, mode="bilinear", align_corners=True)
            if not len(result):
                result = volume.new_zeros(pred.shape[1], h, w, d)
            result[:, r0:r1, c0:c1, slices] = pred[..., : r1 - r0, : c1 - c0].to(volume.dtype).permute(1, 2, 3, 0)
        if self.output == "location":
            return result * inside
        centers = [patch_centers(torch.arange(n, device=volume.device) - before, p, n) for n in (h, w)]
        location = torch.stack(torch.meshgrid(*centers, indexing="ij"))[..., None]
        if self.output == "paper":
            return paper_channels(result[None], location[None])[0]
        if isinstance(network, Components) and not network.behind:
            return torch.cat([result.new_zeros(2, h, w, d), result * inside])
        channels = fill_outside(anomaly_channels(result[None, :4], location[None])[0], inside[None])
        return torch.cat([channels, result[4:] * inside])

    def _tiles(self, inside: torch.Tensor) -> Iterator[tuple[torch.Tensor, tuple[int, int], tuple[int, int]]]:
        """Slices, rows and columns that together cover the brain, of at most ``max_positions`` positions each (one row
        of one slice at least); rows and columns start at multiples of the stride.
        """

        def extent(filled: torch.Tensor) -> tuple[int, int]:
            at = torch.nonzero(filled)[:, 0]
            return int(at[0]) // self.stride * self.stride, int(at[-1]) + 1

        budget = self.max_positions * self.stride**2
        rows_filled, cols_filled = inside.any(1).cpu(), inside.any(0).cpu()  # [H, D], [W, D]
        slices = torch.nonzero(rows_filled.any(0))[:, 0]
        if self.whole_slices:
            yield from ((k, (0, len(rows_filled)), (0, len(cols_filled))) for k in slices.to(inside.device).split(1))
            return
        (r0, r1), (c0, c1) = extent(rows_filled.any(1)), extent(cols_filled.any(1))
        for chunk in slices.split(max(1, budget // ((r1 - r0) * (c1 - c0)))):
            (r0, r1), (c0, c1) = extent(rows_filled[:, chunk].any(1)), extent(cols_filled[:, chunk].any(1))
            step = max(1, budget // ((c1 - c0) * len(chunk)) // self.stride) * self.stride
            for r in range(r0, r1, step):
                yield chunk.to(inside.device), (r, min(r + step, r1)), (c0, c1)
