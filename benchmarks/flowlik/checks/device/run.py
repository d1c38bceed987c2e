"""Parts one after the other, each in a process of its own with a time limit, one JSON line each in `device.jsonl`.

A part that raises, dies or takes too long says so in its line, with what it had found, and the others go on. A call
with the same folder skips the parts that are done on the same device.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from flowlik.checks.device.setting import Setting, in_a_line
from flowlik.records import journal
from flowlik.records.writing import append_line, to_line, utc_now
from flowlik_models.names import unknown

FILE: Final = "device.jsonl"
GRACE: Final = 60.0
"""Seconds beyond its limit for a part that ends by itself, such as a training that is saved."""

STARTING: Final = 60.0
"""Seconds for the libraries of the process, which are not the part's."""

TABLE: Final = "flowlik.checks.device.parts:PARTS"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parts (none: all), how many seconds each, where, and where the lines go."""

    parts: Sequence[str] = ()
    seconds: float = 600.0
    device: str = "cpu"
    folder: Path = Path("runs/device")
    table: str = TABLE


def run_parts(plan: Plan) -> Iterator[dict[str, Any]]:
    """The line of every part, as it ends; those of parts done before have `status` "done before".

    Raises:
        ValueError: an unknown part; the line names the valid ones.
        StorageError: the folder cannot be written.
    """
    table = parts_of(plan.table)
    for name in plan.parts:
        if name not in table:
            raise ValueError(unknown("part", name, tuple(table)))
    file = plan.folder / FILE
    finished = done(file, plan.device)
    for name in table:
        if plan.parts and name not in plan.parts:
            continue
        if name in finished:
            yield {"part": name, "status": "done before"}
            continue
        line = _line(name, plan)
        append_line(file, line)
        yield line


def parts_of(table: str) -> Mapping[str, Any]:
    """The parts by name: `module:NAME`."""
    import importlib

    module, _, name = table.partition(":")
    found: Mapping[str, Any] = getattr(importlib.import_module(module), name)
    return found


def done(file: Path, device: str) -> set[str]:
    """The parts whose last line on that kind of device is ok."""
    rows = journal.read(file)[0] if file.is_file() else []
    last = {row.get("part"): row.get("status") for row in rows if row.get("device") == _kind(device)}
    return {str(part) for part, status in last.items() if status == "ok"}


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _line(name: str, plan: Plan) -> dict[str, Any]:
    """Run one part in a process and say what came of it."""
    started = utc_now()
    setting = Setting(plan.device, plan.seconds, str(plan.folder))
    context: Any = multiprocessing.get_context("forkserver" if _has_forkserver() else "spawn")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own words, which are no line of ours
    if _has_forkserver():
        context.set_forkserver_preload([plan.table.partition(":")[0]])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, plan.table, name, setting), daemon=True)
    process.start()
    theirs.close()
    try:
        status, reason, entries, seconds = _heard(ours, plan.seconds)
    finally:
        process.kill()
        process.join()
        ours.close()
    if status == "died":
        status, reason = "failed", f"the process ended with status {process.exitcode}"
    found = {"reason": reason} if reason else {}
    about = {"part": name, "status": status, "device": _kind(plan.device), "full_size": setting.full}
    return {**about, "started": started, "seconds": round(seconds, 1), **found, "entries": entries}


def _has_forkserver() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()


def _heard(connection: Connection, limit: float) -> tuple[str, str, list[dict[str, Any]], float]:
    """Status, reason, entries and seconds of a part, from what its process says until the limit."""
    entries: list[dict[str, Any]] = []
    begun, until = time.monotonic(), time.monotonic() + STARTING
    while True:
        if not connection.poll(max(0.0, until - time.monotonic())):
            return "timeout", f"no end within {limit:g} s", entries, time.monotonic() - begun
        try:
            told = json.loads(connection.recv_bytes())
            kind, said = told["kind"], told["said"]
        except EOFError:
            return "died", "", entries, time.monotonic() - begun
        if kind == "begun":
            begun, until = time.monotonic(), time.monotonic() + limit + GRACE * (limit > GRACE)
        elif kind == "entry":
            entries.append(said)
        else:
            return _verdict(kind, entries), said, entries, time.monotonic() - begun


def _verdict(kind: str, entries: list[dict[str, Any]]) -> str:
    """A part that ended without an error is ok where every entry is, too."""
    if kind != "ok":
        return kind
    if any("failed" in entry for entry in entries):
        return "failed"
    return "unfinished" if any(entry.get("unfinished") for entry in entries) else "ok"


def _child(connection: Connection, table: str, name: str, setting: Setting) -> None:
    """Run a part and say each entry as it is found."""

    def say(kind: str, what: Any) -> None:
        connection.send_bytes(to_line({"kind": kind, "said": what}))

    say("begun", "")
    try:
        for entry in parts_of(table)[name](setting):
            say("entry", entry)
    except Exception as error:
        line = in_a_line(error)
        say(*(("skipped", line.partition(": ")[2]) if _is_missing(error) else ("failed", line)))
    else:
        say("ok", "")


def _is_missing(error: Exception) -> bool:
    """Whether something is not there that the user can get, as the message says; by name, since importing the types
    takes longer than many a part."""
    return type(error).__name__ in ("UnavailableError", "MissingDataError")
