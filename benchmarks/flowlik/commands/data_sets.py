"""`flowlik data`: which data is where, and how to get what is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowlik_models.images.download import Progress


def listing(root: Path | None) -> dict[str, dict[str, str]]:
    """Every task's data: state, place and what to do about it."""
    from flowlik.tasks.registry import registry
    from flowlik_models.closed_forms.image_mixtures import IMAGES_OF
    from flowlik_models.images.inventory import inventory

    found = {}
    for entry in inventory(root):
        found[entry.name] = {"state": entry.state, "where": entry.where, "detail": entry.detail}
    for name in registry():
        source = IMAGES_OF.get(name)
        if source in found:
            found[name] = {"state": found[source]["state"], "where": "", "detail": f"fitted to {source}"}
        elif name == "digits" or source == "digits":
            found[name] = {"state": "included", "where": "", "detail": "from scikit-learn"}
        elif name not in found:
            found[name] = {"state": "included", "where": "", "detail": "closed form"}
    return found


def print_listing(found: dict[str, dict[str, str]], root: Path | None) -> None:
    """The listing as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("data", "state", "where", ""):
        table.add_column(column, overflow="fold", no_wrap=column in ("data", "state"))
    for name, entry in found.items():
        table.add_row(name, entry["state"], escape(entry["where"]), escape(entry["detail"]))
    console.print(f"data folder: {root or 'none'}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def check_get(name: str, root: Path | None) -> None:
    """Raise ValueError where there is no such data set, or no folder to put it."""
    from flowlik_models.images import CATALOG
    from flowlik_models.names import unknown

    if name not in CATALOG:
        raise ValueError(unknown("data set", name, tuple(CATALOG)))
    if root is None:
        raise ValueError("no data folder: give --data-dir or set FLOWLIK_DATA")


def get(name: str, root: Path) -> Path:
    """Fetch a data set into the data folder, with a progress bar; its folder.

    Raises:
        ValueError: a download that failed; one line says why.
    """
    from flowlik_models.images import CATALOG
    from flowlik_models.images.download import fetch

    with _bars() as progress:
        files = fetch(CATALOG[name], root, progress=progress)
    return files[0].parent


@contextmanager
def _bars() -> Iterator[Progress]:
    """One progress bar a file on a terminal; a line as each file ends otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console()
    if not console.is_terminal:

        def line(name: str, have: int, size: int) -> None:
            if have >= size:
                console.print(f"{name}: {have:,} bytes", markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as shown:
        bars: dict[str, Any] = {}

        def update(name: str, have: int, size: int) -> None:
            if name not in bars:
                bars[name] = shown.add_task(name, total=size)
            shown.update(bars[name], completed=have)

        yield update
