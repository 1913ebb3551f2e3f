import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bundle.errors import InputError
from bundle.inference import EmbeddingMapd, PatchLocationInferer, fit_embedding, load_embedding
from bundle.inference.embedding import COMPONENTS, Components, Embedding, FeatureMoments, principal_components
from bundle.networks import PatchLocator, save_weights
from bundle.transforms.normative import ALL, hold
from tests.conftest import ellipsoid, meta

SHAPE = (14, 16, 9)
BRAIN = torch.as_tensor(ellipsoid(SHAPE, (6, 7, 3.5)))[None]
GRID = {"spacing": 4.0, "spatial_size": list(SHAPE)}


def network():
    torch.manual_seed(3)
    return PatchLocator(patch_size=8, channels=4, max_channels=8, features=24).eval()


def scans(number, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {"image": meta(BRAIN[0].numpy() * generator.uniform(0.2, 1.0, SHAPE), np.diag([4, 4, 4, 1]))}
        for _ in range(number)
    ]


def test_dense_components_are_those_of_each_patch():
    net, image = network(), scans(1)[0]["image"].as_tensor()
    center, projection = torch.rand(24), torch.rand(24, 5)
    inferer = PatchLocationInferer(8, output="location")
    dense = inferer(image[None], Components(net, center, projection))[0]
    assert dense.shape == (5, *SHAPE)
    padded = torch.nn.functional.pad(image[0].permute(2, 0, 1), (4, 3, 4, 3))
    for i, j, k in ((7, 8, 4), (5, 6, 3)):
        patch = padded[k, i : i + 8, j : j + 8]
        x = torch.stack([patch, torch.full_like(patch, (k + 0.5) / SHAPE[2])])[None]
        expected = (net.embed(x)[0, :, 0, 0] - center) @ projection
        torch.testing.assert_close(dense[:, i, j, k], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net(x), torch.cat([net.location_head(net.embed(x)), net.variance_head(net.embed(x))], 1))


def test_components_see_a_range_of_intensities_and_the_heads_all():
    net, image, telling = network(), scans(1)[0]["image"].as_tensor()[None], (0.4, 0.7)
    parts = torch.rand(24), torch.rand(24, 5)
    inferer = PatchLocationInferer(8, output="location")
    held = torch.where(BRAIN[None] > 0, image.clamp(*telling), 0)
    assert (hold(image, telling) == held).all() and not (held == image).all()
    found = inferer(image, Components(net, *parts, telling, behind=True))[0]
    assert found.shape == (9, *SHAPE)
    torch.testing.assert_close(found[:4], inferer(image, net)[0])
    torch.testing.assert_close(found[4:], inferer(held, Components(net, *parts))[0])


def test_components_are_those_of_the_patches_in_the_brain():
    net, image = network(), scans(1)[0]["image"].as_tensor()[0]
    center, projection = principal_components([image], net, 8)
    identity = Components(net, torch.zeros(24), torch.eye(24))
    features = PatchLocationInferer(8, output="location")(image[None, None], identity)[0][:, image > 0].T.double()
    torch.testing.assert_close(center.double(), features.mean(0), atol=1e-4, rtol=1e-4)  # few enough to be all taken
    _, _, axes = np.linalg.svd((features - features.mean(0)).numpy(), full_matrices=False)
    overlap = np.abs((projection.double().T.numpy() @ axes[:16].T).diagonal())
    np.testing.assert_allclose(overlap[:4], 1, atol=1e-3)


def test_distance_is_that_of_mahalanobis():
    """One block for all: scikit-learn's way is a sum over everything."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator)
    healthy = [torch.einsum("ij,jhwd->ihwd", mixing, torch.randn(3, *SHAPE, generator=generator)) for _ in range(6)]
    moments = FeatureMoments(SHAPE, 4.0, 3)
    for values in healthy:
        moments.add(values, BRAIN > 0)
    assert moments.count.sum() == 6 * (BRAIN > 0).sum()
    fitted = moments.fit(torch.zeros(3), torch.eye(3))
    distance = fitted.distance(healthy[0], BRAIN > 0)
    assert distance.shape == (1, *SHAPE) and (distance[BRAIN == 0] == 0).all()
    inside = BRAIN[0] > 0
    rows = torch.cat([values[:, inside].T for values in healthy]).numpy()
    inverse = np.linalg.inv(np.cov(rows.T))
    off = healthy[0][:, inside].T.numpy() - rows.mean(0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", off, inverse, off))
    assert np.corrcoef(distance[0][inside].numpy(), expected)[0, 1] > 0.95
    assert distance[0][inside].mean() == pytest.approx(expected.mean(), rel=0.15)
    odd = healthy[0].clone()
    odd[:, 7, 8, 4] += 20
    assert fitted.distance(odd, BRAIN > 0).argmax() == torch.tensor([[[7 * 16 * 9 + 8 * 9 + 4]]]).item()


def test_mean_and_covariance_belong_to_their_place():
    """Each block's own mean and matrix, worked out by hand."""
    mean = torch.zeros(2, 2, 1, 1)
    mean[:, 1] = 10.0
    whitening = torch.eye(2)[:, :, None, None, None].repeat(1, 1, 2, 1, 1)
    whitening[:, :, 1] *= 0.5
    found = Embedding(torch.zeros(2), torch.eye(2), mean, whitening, edge=3)
    components = torch.zeros(2, 6, 3, 3)
    inside = torch.ones(1, 6, 3, 3, dtype=torch.bool)
    distance = found.distance(components, inside)[0]
    assert distance[0].max() == 0
    torch.testing.assert_close(distance[5], torch.full((3, 3), 0.5 * 200**0.5))


def test_written_read_and_bound_to_its_model(tmp_path):
    model = tmp_path / "model.pt"
    save_weights(network(), model)
    path = tmp_path / "embedding_t1.json"
    inferer = PatchLocationInferer(8, output="location")
    fit_embedding(scans(4), network(), inferer, path, model, "t1", GRID)
    add = EmbeddingMapd("image", network(), inferer, model, path)
    scan = scans(1, seed=9)[0]
    usual = add(scan)["embedding"]
    assert usual.shape == (1, *SHAPE) and usual[BRAIN > 0].mean() > 1 and (usual.affine == scan["image"].affine).all()
    strange = meta(np.where(BRAIN[0] > 0, scan["image"][0] + 3 * (np.arange(14) > 9)[:, None, None], 0))
    assert add({"image": strange})["embedding"][0, 11, 8, 4] > 2 * usual[0, 11, 8, 4]
    assert "embedding" not in EmbeddingMapd("image", network(), inferer, model, tmp_path / "gone.json")(scan)
    again = tmp_path / "embedding_held.json"
    fit_embedding(scans(4), network(), inferer, again, model, "t1", GRID, telling=[0.4, 0.7])
    assert (load_embedding(again, model).telling, load_embedding(path, model).telling) == ((0.4, 0.7), ALL)
    add_held = EmbeddingMapd("image", network(), inferer, model, again)
    held = {"image": hold(scan["image"], (0.4, 0.7))}
    torch.testing.assert_close(add_held(held)["embedding"], add_held(scan)["embedding"])
    with pytest.raises(InputError, match="telling_intensity"):
        fit_embedding(scans(4), network(), inferer, again, model, "t1", GRID, telling=[0.7, 0.4])
    older = {name: value for name, value in json.loads(path.read_text()).items() if name != "telling"}
    path.write_text(json.dumps(older))
    assert load_embedding(path, model).telling == ALL
    other = network()
    torch.nn.init.zeros_(other.location_head[0].weight)
    save_weights(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match="made with another model"):
        load_embedding(path, tmp_path / "other.pt")
    with pytest.raises(InputError, match="a Identity has no embedding"):
        EmbeddingMapd("image", torch.nn.Identity(), inferer, model, path)(scan)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "whitening": {}}))
    with pytest.raises(InputError, match="damaged embedding"):
        load_embedding(path, model)


def test_kept_only_while_scans_are_matched_in_the_same_way(tmp_path, capsys, monkeypatch):
    class Listed(list):
        data = ({"image": "a.nii.gz"},)

    model, path = tmp_path / "model.pt", tmp_path / "embedding_t1.json"
    save_weights(network(), model)
    use = (Listed(scans(4)), network(), PatchLocationInferer(8, output="location"), path, model, "t1", GRID)
    for matching, kept in ((1, False), (1, True), (2, False)):
        monkeypatch.setattr("bundle.inference.embedding.MATCHING", matching)
        fit_embedding(*use)
        assert ("of the same model, range and scans already" in capsys.readouterr().out) == kept
    path.with_name("embedding_t1_mean.nii.gz").unlink()  # a file of it that is gone is made again
    fit_embedding(*use)
    load_embedding(path, model)


def test_too_few_people_and_networks_without_are_left_alone(tmp_path, capsys):
    model = tmp_path / "model.pt"
    save_weights(network(), model)
    inferer = PatchLocationInferer(8, output="location")
    fit_embedding(scans(2), network(), inferer, tmp_path / "embedding_t1.json", model, "t1", GRID)
    assert "at least 3 healthy scans, got 2" in capsys.readouterr().out
    fit_embedding(scans(3), torch.nn.Identity(), inferer, tmp_path / "embedding_t1.json", model, "t1", GRID)
    assert not (tmp_path / "embedding_t1.json").exists()


def test_one_pass_of_the_network_serves_both(tmp_path):
    """The inferer's further channels give the very map that a pass of its own gives, and change no other channel."""
    model, path = tmp_path / "model.pt", tmp_path / "embedding_t1.json"
    save_weights(network(), model)
    alone = PatchLocationInferer(8, output="location")
    fit_embedding(scans(4), network(), alone, path, model, "t1", GRID)
    scan, both = scans(1, seed=9)[0], PatchLocationInferer(8, model_file=str(model), embedding_file=str(path))
    pred = both(scan["image"][None], network())[0]
    usual = PatchLocationInferer(8)(scan["image"][None], network())[0]
    assert pred.shape == (2 + COMPONENTS, *SHAPE) and torch.equal(pred[:2].as_tensor(), usual.as_tensor())
    add = EmbeddingMapd("image", torch.nn.Sequential(), alone, model, path)
    add.network.embed = None  # an embedding of its own would fail
    expected = EmbeddingMapd("image", network(), alone, model, path)(scan)["embedding"]
    assert torch.equal(add({**scan, "pred": pred})["embedding"].as_tensor(), expected.as_tensor())


@pytest.mark.parametrize(
    "needed, heads, features",
    [({"z"}, 0, 0), ({"embedding", "z"}, 0, 1), ({"variance"}, 1, 1), ({"variance", "embedding"}, 1, 1)],
)
def test_what_a_score_does_not_need_is_not_run(tmp_path, needed, heads, features):
    model, path = tmp_path / "model.pt", tmp_path / "embedding_t1.json"
    save_weights(network(), model)
    files = {"model_file": str(model), "embedding_file": str(path)}
    fit_embedding(scans(4), network(), PatchLocationInferer(8, output="location"), path, model, "t1", GRID)
    volume, net, ran = scans(1, seed=9)[0]["image"][None], network(), []
    calibration = SimpleNamespace(load=lambda _: SimpleNamespace(needed_maps=lambda _: needed))
    for part in ("locate", "embed"):
        whole = getattr(net, part)
        setattr(net, part, lambda x, whole=whole, part=part: ran.append(part) or whole(x))
    full, some = (
        PatchLocationInferer(8, **files),
        PatchLocationInferer(8, **files, score="any", calibration=calibration),
    )
    expected = full(volume, network())[0]
    found = some(volume, net)[0]
    assert (min(ran.count("locate"), 1), min(ran.count("embed"), 1)) == (heads, features)
    assert torch.equal(found[:2], expected[:2] if heads else torch.zeros_like(expected[:2]))
    assert torch.equal(found[2:], expected[2:] if "embedding" in needed else expected[:0])
