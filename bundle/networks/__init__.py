from .engine import load_engine
from .patch_locator import PatchLocator
from .resnet_patch_locator import ResNetPatchLocator
from .weights import load_weights, save_weights

__all__ = ["PatchLocator", "ResNetPatchLocator", "load_engine", "load_weights", "save_weights"]
