import numpy as np

from bundle.data import load_atlas
from tests.conftest import CENTER


def test_share_of_the_brain_beyond_the_grid_is_as_the_readme_says():
    mask = load_atlas().brain_mask
    height = mask.affine[2, 2].item() * np.nonzero(mask[0].numpy())[2] + mask.affine[2, 3].item()
    top, bottom = CENTER[2] + 50, CENTER[2] - 50
    assert round(100 * (height > top).mean()) == 8 and round(100 * (height < bottom).mean()) == 4
