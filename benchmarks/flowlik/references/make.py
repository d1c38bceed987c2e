"""References: what a likelihood is judged against, how it was made, and the checks it passed.

A closed-form task needs none stored: its truth is evaluated at the items themselves, and `flowlik reference` writes a
summary of it. For images the reference is the teacher's converged likelihood, one fixed dequantised point per image, by
the rule of `flowlik.references.fixed_rk4`: 64 steps, exact trace at the nodes (`digits`), with the distance to 128
steps on the first items as its error. Beyond `EXACT_DIMS` dimensions the trace is taken by pooled probes
(`flowlik.references.pooled`). Stored are `<task>.json` and `<task>.npz`.
"""

from __future__ import annotations

from pathlib import Path

from flowlik.records.paths import need_source_root
from flowlik.references.card import Say
from flowlik.references.closed_form import _summarise_closed_form
from flowlik.references.exact import ITEMS, _converge
from flowlik.references.pooled import converge
from flowlik.tasks.arrays import ArrayTask
from flowlik.tasks.registry import get_task
from flowlik.tasks.stored_references import FOLDER, read_stored
from flowlik_models.files import remove_leftovers, write_atomically
from flowlik_models.numerics.float32 import full_float32

EXACT_DIMS = 128  # a node costs d products an item


# --- making -------------------------------------------------------------------------------------------------
@full_float32()
def make_reference(
    task: str,
    folder: Path,
    *,
    device: str = "cpu",
    limit: int | None = None,
    stderr: float | None = None,
    progress: Say = lambda _: None,
) -> Path:
    """Compute a task's reference and write it to `folder`; the path of its card.

    Args:
        task: task id.
        folder: where to write; partial results of an interrupted call are kept there and used.
        device: where the teacher runs.
        limit: items a split, default 256, of pooled probes 500.
        stderr: standard error of an item in bits/dim that pooled probes are to reach; without it the trace is exact up
            to `EXACT_DIMS` dimensions, and the error 0.005 beyond.
        progress: called with lines of text.

    Raises:
        ValueError: unknown task, an error or a limit that has no effect, or a check that failed. UnavailableError: the
            teacher is not there.
    """
    read_stored.cache_clear()
    remove_leftovers(folder)
    found = get_task(task)
    if isinstance(found, ArrayTask) and found.reference_model == "closed-form":
        raise ValueError(f"{found.name}: the truth is given as log_prob: no reference is to be made")
    if found.reference_model == "closed-form":
        for option, value in (("--stderr", stderr), ("--limit", limit)):
            if value is not None:
                raise ValueError(f"{task} is known in closed form: {option} has no effect")
        return _summarise_closed_form(found, folder)  # type: ignore[arg-type]
    if stderr is not None or found.dim > EXACT_DIMS:
        return converge(found, folder, device, limit, stderr, progress)
    return _converge(found, folder, device, limit or ITEMS, progress)


def ship_reference(task: str, folder: Path) -> Path:
    """Copy a reference from `folder` into the source tree; the path of its card there."""
    target = need_source_root("--ship") / "results" / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for suffix in (".npz", ".json"):
        file = folder / f"{task}{suffix}"
        if file.exists():
            write_atomically(target / file.name, file.read_bytes())
    read_stored.cache_clear()
    return target / f"{task}.json"
