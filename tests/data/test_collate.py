import torch

from bundle.data import collate_samples


def test_nested_samples_make_one_batch():
    batch = [
        [[{"image": torch.full((1, 2), 10.0 * s + p)} for p in range(3)] for s in range(2)],
        {"image": torch.ones(1, 2)},
    ]
    out = collate_samples(batch)["image"]
    assert out.shape == (7, 1, 2) and out[:, 0, 0].tolist() == [0, 1, 2, 10, 11, 12, 1]
