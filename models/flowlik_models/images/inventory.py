"""What lies in a data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowlik_models.images.catalog import CATALOG, DataSet
from flowlik_models.images.checksums import verify
from flowlik_models.images.errors import DataError
from flowlik_models.images.image_set import look, open_images

ALL_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Entry:
    """One data set: ``state`` is verified, found (its files have no published sums), damaged, incomplete or missing."""

    name: str
    state: str
    where: str
    detail: str


def inventory(root: Path | None) -> list[Entry]:
    """Every data set of the catalogue as it lies below ``root``; files with published sums are read and checked."""
    return [_entry(data_set, root) for data_set in CATALOG.values()]


def _entry(data_set: DataSet, root: Path | None) -> Entry:
    get = f"flowlik data get {data_set.id}"
    if root is None:
        return Entry(data_set.id, "missing", "", f"give --data-dir or set FLOWLIK_DATA, then: {get}")
    found = look(data_set, root, ALL_SPLITS)
    if not found:
        folders = dict.fromkeys(f"{release.folders[0]}/" for release in data_set.releases)
        return Entry(data_set.id, "missing", "", f"{get}, or put its files into {' or '.join(folders)}")
    best = found[0]
    where = str(next(iter(best.there.values())).parent.relative_to(root)) + "/"
    if best.missing:
        return Entry(data_set.id, "incomplete", where, f"no {', '.join(best.missing)}; {get}")
    try:
        for name, path in best.there.items():
            if name in best.release.digests:
                verify(path, best.release.digests[name])
        if not best.release.digests:
            for split in ALL_SPLITS:
                open_images(data_set, split, root)
    except DataError as error:
        return Entry(data_set.id, "damaged", where, str(error))
    counts = ", ".join(f"{count:,} {split}" for split, count in data_set.sizes.items())
    known = f"{best.release.name} release, {counts}"
    if best.release.digests:
        return Entry(data_set.id, "verified", where, known)
    return Entry(data_set.id, "found", where, f"{known}; no sums of its files are published")
