"""Image files are read as the official releases write them, and nothing else is taken for them."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest
import torch

from flowlik_models.images import CATALOG, DataError, DataSet, MissingDataError, evaluation_order, open_images
from flowlik_models.images.folders import CACHE_VARIABLE
from flowlik_models.images.inventory import inventory

FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def rewrite(path: Path, content: bytes, data_set: DataSet) -> DataSet:
    """Put other content behind a file's name and publish its digest: what is wrong is then the content itself."""
    path.write_bytes(content)
    digests = {**data_set.releases[0].digests, path.name: image_files.md5(path)}
    return data_set.with_digests(digests, data_set.sizes)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_and_plain(tmp_path: Path, packed: bool) -> None:
    data_set = image_files.write_idx(tmp_path, packed=packed)
    levels, labels = image_files.images(image_files.TEST, (28, 28), seed=image_files.TEST)
    found = open_images(data_set, "test", tmp_path)
    assert len(found) == image_files.TEST
    assert torch.equal(found.pixels(range(20)), torch.from_numpy(levels)[:, None])
    assert found.labels.tolist() == labels.tolist()
    assert found.pixels([7, 3])[0].equal(found.pixels([3, 7])[1])


def test_both_releases_of_cifar_hold_the_same_images(tmp_path: Path) -> None:
    python = open_images(image_files.write_cifar(tmp_path), "train", tmp_path)
    binary = open_images(image_files.write_cifar(tmp_path / "b", binary=True), "train", tmp_path / "b")
    assert (python.release, binary.release) == ("python", "binary")
    assert python.pixels(range(50)).equal(binary.pixels(range(50)))
    assert python.labels.equal(binary.labels)
    assert python.identity == binary.identity
    assert python.identity != open_images(image_files.write_cifar(tmp_path), "test", tmp_path).identity
    levels, _ = image_files.images(10, (3072,), seed=3)
    assert (
        python.pixels([31]).numpy().tobytes() == levels[1].tobytes()
    )  # the second image of the fourth batch


@pytest.mark.parametrize("compressed", [True, False])
def test_npz_batches_are_mapped_and_their_labels_begin_at_zero(tmp_path: Path, compressed: bool) -> None:
    data_set = image_files.write_imagenet(tmp_path, compressed=compressed)
    found = open_images(data_set, "train", tmp_path)
    assert found.labels.tolist() == list(range(5)) * 10
    assert not (tmp_path / "cache").exists()  # nothing is unpacked before it is looked at
    levels, _ = image_files.images(5, (12288,), seed=2)
    assert found.pixels([11]).numpy().tobytes() == levels[1].tobytes()
    assert isinstance(found.parts[2].pixels(), np.memmap)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == (1 if compressed else 0)


@pytest.mark.parametrize("compressed", [True, False])
def test_an_altered_npz_batch_fails_its_own_checksum(tmp_path: Path, compressed: bool) -> None:
    data_set = image_files.write_imagenet(tmp_path, compressed=compressed)
    file = tmp_path / "imagenet64" / "val_data.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"val_data\.npz: array 'data' is damaged"):
        open_images(data_set, "test", tmp_path).pixels([0])
    assert not list(tmp_path.rglob("*.npy"))


def test_a_missing_data_set_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MissingDataError, match=r"expected .*fashion-mnist.*; get it with: flowlik data get fashion-mnist"
    ):
        open_images("fashion-mnist", "test", tmp_path)
    monkeypatch.delenv("FLOWLIK_DATA", raising=False)
    with pytest.raises(MissingDataError, match="set FLOWLIK_DATA or give --data-dir"):
        open_images("cifar10", "test")
    data_set = image_files.write_idx(tmp_path)
    (tmp_path / "fashion-mnist" / f"{FASHION[1]}.gz").unlink()
    with pytest.raises(MissingDataError, match=r"train-labels-idx1-ubyte\.gz"):
        open_images(data_set, "train", tmp_path)
    assert len(open_images(data_set, "test", tmp_path)) == 20  # of which no file is missing


def test_files_that_are_not_as_published_are_refused(tmp_path: Path) -> None:
    image_files.write_idx(tmp_path)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: expected MD5 8d4fb7e6\w+, found MD5"):
        open_images("fashion-mnist", "train", tmp_path)
    data_set = image_files.write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"test_batch: expected MD5 .* truncated, altered"):
        open_images(data_set, "test", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x08", "to begin with 000008"),
        (b"\x00\x00\x0d\x03" + bytes(12), "expected an idx file of bytes in 3 dimensions"),
        (image_files.idx(np.zeros((50, 28, 28), np.uint8))[:-1], "expected 39216 bytes .* found 39215"),
        (
            image_files.idx(np.zeros((50, 27, 28), np.uint8)),
            r"expected images of \(28, 28\), found \(27, 28\)",
        ),
        (image_files.idx(np.zeros((49, 28, 28), np.uint8)), "a label for each of 49 images, found 50"),
    ],
)
def test_wrong_idx_files_are_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    data_set = image_files.write_idx(tmp_path, packed=False)
    data_set = rewrite(tmp_path / "fashion-mnist" / FASHION[0], content, data_set)
    with pytest.raises(DataError, match=message) as caught:
        open_images(data_set, "train", tmp_path)
    assert FASHION[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gzip_file_cut_off_is_named(tmp_path: Path) -> None:
    data_set = image_files.write_idx(tmp_path)
    file = tmp_path / "fashion-mnist" / f"{FASHION[0]}.gz"
    data_set = rewrite(file, file.read_bytes()[:-20], data_set)
    with pytest.raises(DataError, match=r"expected a complete gzip file"):
        open_images(data_set, "train", tmp_path)


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    data_set = image_files.write_idx(tmp_path)
    labels = np.arange(50, dtype=np.uint8) % 10
    labels[7] = 11
    file = tmp_path / "fashion-mnist" / f"{FASHION[1]}.gz"
    data_set = rewrite(file, gzip.compress(image_files.idx(labels)), data_set)
    with pytest.raises(
        DataError, match=r"labels-idx1-ubyte\.gz: expected labels 0\.\.9, found 11 for image 7"
    ):
        open_images(data_set, "train", tmp_path)
    images = image_files.write_imagenet(tmp_path)
    np.savez(
        tmp_path / "imagenet64" / "val_data.npz", data=np.zeros((20, 12288), np.uint8), labels=np.arange(20)
    )
    with pytest.raises(DataError, match=r"expected labels 1\.\.1000, found 0 for image 0"):
        open_images(images, "test", tmp_path)


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("harmed", "w"))


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {b"data": _Harm(), b"labels": []},
            "not a pickle of arrays: expected arrays and plain containers only, found .*open",
        ),
        ({b"data": dataclasses.field}, "found dataclasses.field"),
        (
            {b"data": np.zeros((20, 3072)), b"labels": [0] * 20},
            r"expected data of \(n, 3072\) uint8, found .* float64",
        ),
        ({b"data": np.zeros((20, 30), np.uint8), b"labels": [0] * 20}, r"found \(20, 30\) uint8"),
        ({b"data": np.array([None, 1], dtype=object), b"labels": []}, r"found \(2,\) object"),
        (
            {b"data": np.zeros((20, 3072), np.uint8), b"labels": ["a"] * 20},
            "labels as a list of whole numbers",
        ),
        (
            {b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 19},
            "a label for each of 20 images, found 19",
        ),
        ([1, 2], "expected a dictionary with data and labels, found list"),
    ],
)
def test_pickles_of_anything_but_arrays_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data_set = image_files.write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    data_set = rewrite(file, pickle.dumps(held, protocol=4), data_set)
    with pytest.raises(DataError, match=message) as caught:
        open_images(data_set, "test", tmp_path)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def test_a_pickle_cut_off_is_named(tmp_path: Path) -> None:
    data_set = image_files.write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    data_set = rewrite(file, file.read_bytes()[:-10], data_set)
    with pytest.raises(DataError, match=r"test_batch: not a pickle of arrays"):
        open_images(data_set, "test", tmp_path)


def test_npz_files_of_objects_are_refused(tmp_path: Path) -> None:
    data_set = image_files.write_imagenet(tmp_path)
    objects = np.empty(20, dtype=object)
    np.savez(tmp_path / "imagenet64" / "val_data.npz", data=objects, labels=np.arange(20), allow_pickle=True)
    with pytest.raises(DataError, match=r"val_data\.npz: expected a complete npz file of plain arrays"):
        open_images(data_set, "test", tmp_path)


def test_a_split_of_another_size_is_refused(tmp_path: Path) -> None:
    data_set = image_files.write_imagenet(tmp_path).with_digests({}, CATALOG["imagenet64"].sizes)
    with pytest.raises(DataError, match="expected 50000 images of imagenet64 test, found 20"):
        open_images(data_set, "test", tmp_path)


def test_dequantisation_keeps_levels_and_depends_on_item_and_draw_alone(tmp_path: Path) -> None:
    images = open_images(image_files.write_cifar(tmp_path), "train", tmp_path)
    index = torch.tensor([4, 40, 2])
    z = images.batch(index, key=1, dtype=torch.float64)
    assert torch.equal(((z + 1) * 128).floor().to(torch.uint8), images.pixels(index))
    assert torch.equal(images.batch(index[1:], key=1, dtype=torch.float64), z[1:])
    again = images.batch(index, key=1, draw=1, dtype=torch.float64)
    assert float((again - z).abs().max()) < 2 / 256
    assert not torch.equal(again, z)
    assert float(images.batch(index, key=1).max()) < 1.0


def test_flips_mirror_about_half_of_the_images_keyed_by_item_and_epoch(tmp_path: Path) -> None:
    images = open_images(image_files.write_cifar(tmp_path), "train", tmp_path)
    index = torch.arange(50)
    plain = images.pixels(index)
    shown = [
        ((images.batch(index, key=1, draw=k, flips=True, dtype=torch.float64) + 1) * 128).floor().byte()
        for k in range(8)
    ]
    flipped = torch.stack([(x == plain.flip(-1)).flatten(1).all(1) for x in shown])
    kept = torch.stack([(x == plain).flatten(1).all(1) for x in shown])
    assert bool((flipped ^ kept).all())
    assert 150 < int(flipped.sum()) < 250
    assert CATALOG["cifar10"].flips
    assert not CATALOG["mnist"].flips


def test_the_order_of_evaluation_is_a_fixed_permutation() -> None:
    assert sorted(evaluation_order(100).tolist()) == list(range(100))
    assert evaluation_order(10).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


def test_the_inventory_tells_verified_from_damaged_and_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = image_files.write_idx(tmp_path, "mnist")
    monkeypatch.setitem(CATALOG, "mnist", data_set)
    monkeypatch.setitem(CATALOG, "imagenet64", image_files.write_imagenet(tmp_path))
    image_files.write_idx(tmp_path, "fashion-mnist")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"")
    found = {entry.name: entry for entry in inventory(tmp_path)}
    states = {name: entry.state for name, entry in found.items()}
    assert states == {
        "mnist": "verified", "fashion-mnist": "damaged", "cifar10": "incomplete", "imagenet64": "found"
    }  # fmt: skip
    assert "data_batch_1.bin" in found["cifar10"].detail
    assert "expected MD5" in found["fashion-mnist"].detail
    assert {entry.state for entry in inventory(None)} == {"missing"}
