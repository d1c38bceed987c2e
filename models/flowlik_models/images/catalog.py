"""The image data sets: files, checksums and addresses of their official releases.

Checksums of MNIST's and Fashion-MNIST's archives and of CIFAR-10's two releases are the published MD5 sums; those of
unpacked idx files are of the content of the archives. For ImageNet 64x64 sums are published of the three zip archives
only (SHA-256), so its npz batches are held to their own CRC-32 and to the number of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Format = Literal["idx", "cifar-python", "cifar-binary", "npz"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Release:
    """One official form of a data set.

    ``splits``: the files of each split, in order; idx files come in pairs, images then labels. ``digests``: file name
    -> ``md5:...`` or ``sha256:...``; a file that has none is held to what its format says of itself. ``folders``: where
    the files may lie, below the data folder.
    """

    name: str
    format: Format
    folders: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the release."""
        return tuple(name for names in self.splits.values() for name in names)


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file at its official address, or one of several; an archive's members are unpacked and the rest left."""

    addresses: tuple[str, ...]
    digest: str
    size: int
    folder: str
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.addresses[0].rpartition("/")[2]


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """A set of images with 256 levels a channel.

    ``sizes``: images of each split; ``flips``: mirrored images are as likely, and training usually mirrors half of
    them; ``first_label``: what the files call the first class.
    """

    id: str
    title: str
    event_shape: tuple[int, int, int]
    classes: int
    sizes: Mapping[str, int]
    releases: tuple[Release, ...]
    downloads: tuple[Download, ...]
    levels: int = 256
    flips: bool = False
    first_label: int = 0
    terms: str = ""

    def with_digests(self, digests: Mapping[str, str], sizes: Mapping[str, int]) -> DataSet:
        """The same data set with other files behind its names: their digests, and the images of each split."""
        releases = tuple(replace(release, digests=dict(digests)) for release in self.releases)
        return replace(self, releases=releases, sizes=dict(sizes))


_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _packed(name: str) -> str:
    return f"{name}.gz"


def _idx_set(
    id: str,
    title: str,
    terms: str,
    sums: Mapping[str, tuple[str, str, int]],
    addresses: tuple[str, ...],
) -> DataSet:
    """``sums``: name -> MD5 of the unpacked file, MD5 of the archive, bytes of the archive."""
    packed = {split: tuple(map(_packed, names)) for split, names in _IDX.items()}
    return DataSet(
        id=id,
        title=title,
        event_shape=(1, 28, 28),
        classes=10,
        sizes={"train": 60_000, "test": 10_000},
        releases=(
            Release(
                name="idx",
                format="idx",
                folders=(id,),
                splits=_IDX,
                digests={name: f"md5:{plain}" for name, (plain, _, _) in sums.items()},
            ),
            Release(
                name="idx.gz",
                format="idx",
                folders=(id,),
                splits=packed,
                digests={_packed(name): f"md5:{archive}" for name, (_, archive, _) in sums.items()},
            ),
        ),
        downloads=tuple(
            Download(
                addresses=tuple(base + _packed(name) for base in addresses),
                digest=f"md5:{archive}",
                size=size,
                folder=id,
            )
            for name, (_, archive, size) in sums.items()
        ),
        terms=terms,
    )


_MNIST = _idx_set(
    "mnist",
    "MNIST, 28x28 grey",
    "no licence named by the authors",
    {
        "train-images-idx3-ubyte": (
            "6bbc9ace898e44ae57da46a324031adb",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            9_912_422,
        ),
        "train-labels-idx1-ubyte": (
            "a25bea736e30d166cdddb491f175f624",
            "d53e105ee54ea40749a09fcbcd1e9432",
            28_881,
        ),
        "t10k-images-idx3-ubyte": (
            "2646ac647ad5339dbf082846283269ea",
            "9fb629c4189551a2d022fa330f9573f3",
            1_648_877,
        ),
        "t10k-labels-idx1-ubyte": (
            "27ae3e4e09519cfbb04c329615203637",
            "ec29112dd5afa0611ce80d1b7f02629c",
            4_542,
        ),
    },
    # the authors' page has refused many clients for years; the second address holds the same bytes
    ("http://yann.lecun.com/exdb/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
)

_FASHION_MNIST = _idx_set(
    "fashion-mnist",
    "Fashion-MNIST, 28x28 grey",
    "MIT",
    {
        "train-images-idx3-ubyte": (
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            26_421_880,
        ),
        "train-labels-idx1-ubyte": (
            "9018921c3c673c538a1fc5bad174d6f9",
            "25c81989df183df01b3e8a0aad5dffbe",
            29_515,
        ),
        "t10k-images-idx3-ubyte": (
            "8181f5470baa50b63fa0f6fddb340f0a",
            "bef4ecab320f06d8554ea6380940ec79",
            4_422_102,
        ),
        "t10k-labels-idx1-ubyte": (
            "15d484375f8d13e6eb1aabb0c3f46965",
            "bb300cfdad3c16e7a12a480ee83cd310",
            5_148,
        ),
    },
    ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
)

_CIFAR_PYTHON = {
    "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
    "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
    "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "md5:40351d587109b95175f43aff81a1287e",
}
_CIFAR_BINARY = {
    "data_batch_1.bin": "md5:5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "md5:5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "md5:942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "md5:ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "md5:53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "md5:803d5f7f4d78ea53de84dbe85f74fb6d",
}


def _cifar_release(name: str, format: Format, folder: str, digests: Mapping[str, str]) -> Release:
    *train, test = digests
    splits = {"train": tuple(train), "test": (test,)}
    return Release(name=name, format=format, folders=(folder,), splits=splits, digests=digests)


_CIFAR10 = DataSet(
    id="cifar10",
    title="CIFAR-10, 32x32 colour",
    event_shape=(3, 32, 32),
    classes=10,
    sizes={"train": 50_000, "test": 10_000},
    releases=(
        _cifar_release("python", "cifar-python", "cifar-10-batches-py", _CIFAR_PYTHON),
        _cifar_release("binary", "cifar-binary", "cifar-10-batches-bin", _CIFAR_BINARY),
    ),
    downloads=(
        Download(
            addresses=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            digest="md5:c58f30108f718f92721af3b95e74349a",
            size=170_498_071,
            folder="cifar-10-batches-py",
            members=tuple(_CIFAR_PYTHON),
        ),
    ),
    flips=True,
    terms="no licence; the authors ask that the report of 2009 be cited",
)

_IMAGENET_TRAIN = tuple(f"train_data_batch_{number}.npz" for number in range(1, 11))
_IMAGENET_BASE = "https://image-net.org/data/downsample/"


def _imagenet_zip(name: str, digest: str, size: int, members: tuple[str, ...]) -> Download:
    return Download(
        addresses=(_IMAGENET_BASE + name,), digest=digest, size=size, folder="imagenet64", members=members
    )


_IMAGENET64 = DataSet(
    id="imagenet64",
    title="ImageNet 64x64 (downsampled ILSVRC 2012), colour",
    event_shape=(3, 64, 64),
    classes=1000,
    sizes={"train": 1_281_167, "test": 50_000},
    releases=(
        Release(
            name="npz",
            format="npz",
            # as the archives unpack, or all files together
            folders=(
                "imagenet64",
                "imagenet64/Imagenet64_train_part1_npz",
                "imagenet64/Imagenet64_train_part2_npz",
                "imagenet64/Imagenet64_val_npz",
            ),
            splits={"train": _IMAGENET_TRAIN, "test": ("val_data.npz",)},
        ),
    ),
    downloads=(
        _imagenet_zip(
            "Imagenet64_val_npz.zip",
            "sha256:e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8",
            529_522_927,
            ("val_data.npz",),
        ),
        _imagenet_zip(
            "Imagenet64_train_part1_npz.zip",
            "sha256:9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1",
            6_783_426_789,
            _IMAGENET_TRAIN[:5],
        ),
        _imagenet_zip(
            "Imagenet64_train_part2_npz.zip",
            "sha256:9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30",
            6_780_506_068,
            _IMAGENET_TRAIN[5:],
        ),
    ),
    flips=True,
    first_label=1,
    terms="ImageNet's terms of access, non-commercial research",
)

CATALOG: dict[str, DataSet] = {found.id: found for found in (_MNIST, _FASHION_MNIST, _CIFAR10, _IMAGENET64)}
"""The data sets by id."""
