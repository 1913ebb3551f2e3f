"""Batches of samples from several volumes."""

from __future__ import annotations

from typing import Any

from monai.data import list_data_collate


def collate_samples(batch: list[Any]) -> Any:
    """MONAI's `list_data_collate` for samplers that follow each other: a volume gives a list of slices, a slice a list
    of patches, and all of them make one batch.
    """

    def flat(items: list[Any]) -> list[Any]:
        return [sample for item in items for sample in (flat(item) if isinstance(item, list) else [item])]

    return list_data_collate(flat(batch))
