"""The data sets: real images, a fixed split, clear errors."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from torchvision import datasets

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


def test_cifar10_files_are_read(tmp_path, monkeypatch):
    """Files in CIFAR-10's own format; torchvision checks their sums, which these small ones replace."""
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    pixels = np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    train = [write(f"data_batch_{i}", {"data": pixels, "labels": [i, 1, 2, 3]}) for i in range(1, 6)]
    test = [write("test_batch", {"data": pixels[:2], "labels": [7, 8]})]
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    images = load_images("cifar10", tmp_path, download=False)
    assert images.train_x.shape == (20, 3, 32, 32)
    assert images.test_y.tolist() == [7, 8]
    first = torch.tensor(pixels[0].reshape(3, 32, 32)).float() / 255
    torch.testing.assert_close(images.train_x[0], (first - 0.4734) / 0.2516)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_data_names_the_folder_and_the_way_out(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"{name}.*--data-root"):
        load_images(name, None, download=False)
    with pytest.raises(ConfigError, match=rf"no {name} under --data-root {tmp_path}.*--download"):
        load_images(name, tmp_path, download=False)
