"""Values of a score as they come, in a file, and whether a call goes on with those of an earlier one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from flowlik.measures.arrays import Array
from flowlik.records.writing import read_arrays, to_plain, write_arrays
from flowlik.scoring.pilot import Plan
from flowlik_estimators import Estimator, parse_spec
from flowlik_models.files import write_atomically

NOTE, BPD = "note", "bpd"
Say = Callable[[str], None]


class Kept:
    """The file of a score, or nothing (``file`` None). ``key``: what determines the values, by name.

    ``plan`` and ``held``, the arrays, are those of an earlier call, where it was of the same kind.
    """

    def __init__(self, file: Path | None, key: dict[str, Any], say: Say) -> None:
        self.file, self.key, self.say = file, key, say
        self.plan: Plan | None = None
        self.held: dict[str, Array] | None = None

    def look(self, more: dict[str, Any]) -> None:
        """Take what is there if it is of the same key, ``more`` included; say what does not fit."""
        self.key = to_plain(self.key | more)
        if self.file is None or not self.file.is_file():
            return
        try:
            arrays = read_arrays(self.file)
            note = json.loads(str(arrays.pop(NOTE)))
            other = [name for name, value in self.key.items() if note["key"].get(name) != value]
            chosen = None if other else _plan(note["plan"])
        except (ValueError, KeyError, TypeError) as error:
            self.say(f"{self.file}: no file of scores ({' '.join(str(error).split())}); computed anew")
            return
        if chosen is None:
            self.say(f"{self.file}: its values are of another {', '.join(other)}; computed anew")
            return
        arrays.pop(BPD, None)
        self.plan, self.held = chosen, arrays
        self.say(f"{self.file}: goes on with {int(np.isfinite(arrays['forwards']).sum())} values")

    def store(self, arrays: dict[str, Array], plan: Plan) -> None:
        """Write all that is known, whole or not at all."""
        if self.file is not None:
            note = {"key": self.key, "plan": {**asdict(plan), "estimator": plan.estimator.label}}
            write_arrays(self.file, {**arrays, NOTE: np.array(json.dumps(to_plain(note)))})

    def finish(self, arrays: dict[str, Array], plan: Plan, card: dict[str, Any]) -> None:
        """Write the values and, beside them, the answer as JSON."""
        if self.file is not None:
            self.store(arrays, plan)
            text = json.dumps(to_plain(card | {"key": self.key}), indent=2) + "\n"
            write_atomically(self.file.with_suffix(".json"), text.encode())


def _plan(note: dict[str, Any]) -> Plan:
    estimator: Estimator = parse_spec(note["estimator"])[0]
    return Plan(**{each.name: note[each.name] for each in fields(Plan)} | {"estimator": estimator})
