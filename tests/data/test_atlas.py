import numpy as np
import pytest

from bundle.data import load_atlas
from bundle.data.atlas import contrast_doubt, tissue_order
from bundle.errors import InputError
from tests.conftest import CENTER, meta


def test_share_of_the_brain_beyond_the_grid_is_as_the_readme_says():
    mask = load_atlas().brain_mask
    height = mask.affine[2, 2].item() * np.nonzero(mask[0].numpy())[2] + mask.affine[2, 3].item()
    top, bottom = CENTER[2] + 50, CENTER[2] - 50
    assert round(100 * (height > top).mean()) == 8 and round(100 * (height < bottom).mean()) == 4


def painted(fluid, grey, white, extra=0.0):
    """The atlas' brain with its tissues, as its template's brightness tells them, painted; 0 outside."""
    atlas = load_atlas()
    template = atlas.template * atlas.brain_mask
    inside = template > 0
    low, high = np.quantile(template[inside].numpy(), [0.12, 0.6])
    tissues = np.select([template.numpy() < low, template.numpy() < high], [fluid, grey], white)
    return meta((tissues * inside.numpy() + extra)[0], template.affine.numpy())


LOOKS = {"t1": (0.2, 0.6, 0.8), "t2": (1.0, 0.6, 0.4), "flair": (0.1, 0.7, 0.6)}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("contrast", LOOKS)
def test_a_contrast_is_known_by_the_order_of_its_tissues(look, contrast):
    image = painted(*LOOKS[look])
    white, fluid = tissue_order(image, load_atlas())
    assert white == pytest.approx(LOOKS[look][2] - LOOKS[look][1], abs=1e-6)
    assert fluid == pytest.approx(LOOKS[look][0] - LOOKS[look][1], abs=1e-6)
    doubt = contrast_doubt(image, contrast, load_atlas())
    assert (doubt == "") == (look == contrast)
    assert look == contrast or doubt == f"its tissues are not as bright as in a {contrast} scan, but as in {look}"


def test_a_scan_without_a_tissue_is_refused():
    image = painted(0.2, 0.6, 0.8)
    image[:] = 0
    with pytest.raises(InputError, match="does not cover the atlas"):
        tissue_order(image, load_atlas())
