"""Patch2Loc for MONAI: brain lesions found by a network that has only ever learned where healthy patches belong.

One package per stage, imports in one direction only:
``data`` -> ``transforms`` -> ``synthesis`` -> ``networks``, ``losses`` -> ``scoring`` -> ``inference`` ->
``metrics`` -> ``reports``; ``training`` beside them.
"""

__version__ = "0.21.0"
