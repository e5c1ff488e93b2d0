"""The data sets: real images, a fixed split, clear errors."""

import gzip
import struct

import pytest
import torch

from psgrad import ConfigError
from recipes.data import load_images


def test_mnist5k_is_split_for_good():
    images = load_images("mnist5k", None, download=False)
    assert images.train_x.shape == (4000, 1, 28, 28)
    assert images.test_x.shape == (1000, 1, 28, 28)
    assert images.train_y.bincount().tolist() == [400] * 10
    assert images.test_y.bincount().tolist() == [100] * 10
    assert not (images.train_x[:, None] == images.test_x[:50]).flatten(2).all(2).any()
    assert images.train_x.mean().abs() < 0.05


def test_torchvision_files_are_read(tmp_path):
    """Files in MNIST's own format, as torchvision would have fetched them."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = bytes(range(256)) * (count * 784 // 256 + 1)
        image_head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(image_head + pixels[: count * 784])
        label_head = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(label_head + bytes(range(count)))
    for path in list(raw.iterdir()):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
    images = load_images("mnist", tmp_path, download=False)
    assert images.train_x.shape == (6, 1, 28, 28)
    assert images.test_y.tolist() == [0, 1, 2]
    assert images.train_x.dtype == torch.float32


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_data_names_the_folder_and_the_way_out(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"{name}.*--data-root"):
        load_images(name, None, download=False)
    with pytest.raises(ConfigError, match=rf"no {name} under --data-root {tmp_path}.*--download"):
        load_images(name, tmp_path, download=False)
