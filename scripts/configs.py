"""Parts of the configs, for the scripts that run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]


def config_part(config: str, name: str, **settings: Any) -> Any:
    """What ``name`` is in configs/CONFIG.json, on the CPU unless ``settings`` of its keys say otherwise."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / f"configs/{config}.json"))
    parser.update({"bundle_root": str(ROOT), "device": "cpu", **settings})
    return parser.get_parsed_content(name)
