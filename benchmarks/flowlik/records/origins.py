"""Which code the finished records of a folder were made by, where a run goes on with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowlik.records import journal
from flowlik.records.columns import FINISHED
from flowlik.records.environment import commit, versions
from flowlik.records.reading import read_rows


def made_by_other_code(folder: Path) -> str | None:
    """One line on finished records that other code than this one made; None where there are none."""
    try:
        rows = read_rows(folder)
        environments, _ = journal.read(folder / "environments.jsonl")
    except FileNotFoundError:
        return None
    head, changed = commit()
    here = _code({"commit": head, "dirty": changed, "versions": versions()})
    codes = {row.get("env_id"): _code(row) for row in environments}
    others = Counter(
        codes[row["env_id"]] for row in rows if row["status"] in FINISHED and row["env_id"] in codes
    )
    others.pop(here, None)
    if not others:
        return None
    made = " and ".join(others)
    return (
        f"{others.total()} of the cells that are done were run by {made}, this is {here}; they stay as they are: "
        "give another --out to run them anew"
    )


def _code(environment: Mapping[str, Any]) -> str:
    """A version of flowlik in words; its commit where it ran from a source tree."""
    known = environment.get("versions")
    version = known.get("flowlik") if isinstance(known, Mapping) else None
    head = str(environment.get("commit") or "")[:10]
    changed = " with changed files" if environment.get("dirty") else ""
    return f"flowlik {version or 'of no known version'}" + (f" at commit {head}{changed}" if head else "")
