from .engine import load_engine
from .patch_locator import PatchLocator
from .resnet_patch_locator import ResNetPatchLocator

__all__ = ["PatchLocator", "ResNetPatchLocator", "load_engine"]
