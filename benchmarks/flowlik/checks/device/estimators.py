"""Parts that run estimators: against their CPU numbers, their kernels and waits, their time and memory over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from flowlik.checks.device.cases import Case, cases
from flowlik.checks.device.setting import Setting, in_a_line
from flowlik.evaluation.batching import timing
from flowlik.tasks.task import UnavailableError

Entry = dict[str, Any]
ITEMS: Final = 400
PROFILED: Final = 6400
BATCHES: Final = (64, 256, 1024, 4096)
ROUNDS: Final = 5
NO_KERNELS: Final = ("Memcpy", "Memset")
WAITS: Final = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls that make the host wait; the profiler's own at its end is `cudaDeviceSynchronize`."""


def each(setting: Setting, run: Callable[[Case], Entry]) -> Iterator[Entry]:
    """An entry a case; one that fails says so in its entry, and the others go on."""
    for case in cases(setting):
        if isinstance(case, tuple):
            yield {"estimator": case[0], "skipped": case[1]}
            continue
        try:
            found = run(case)
        except UnavailableError as error:
            found = {"skipped": str(error)}
        except Exception as error:
            found = {"failed": in_a_line(error)}
        yield {"estimator": case.estimator.label, "task": case.task, "model": case.model, **found}


def agreement(setting: Setting) -> Iterator[Entry]:
    """Every estimator on the device against the CPU, on the same points and draws, in both precisions."""
    n = setting.of(ITEMS)

    def run(case: Case) -> Entry:
        found: Entry = {"items": n}
        for dtype in ("float32", "float64"):
            here, there = (case.log_prob(device, n, dtype) for device in ("cpu", setting.device))
            both = here.valid & there.valid.cpu()
            gap = (there.log_prob.cpu() - here.log_prob).abs()[both]
            found[f"gap_nats_{dtype}"] = float(gap.max()) if len(gap) else None
            found[f"disagree_on_valid_{dtype}"] = int((here.valid != there.valid.cpu()).sum())
        return found

    return each(setting, run)


def synchronisations(setting: Setting) -> Iterator[Entry]:
    """How often the host waits in one call, and how many kernels (on a CPU: operators) it starts."""
    n = setting.of(PROFILED) if setting.full else 4

    def run(case: Case) -> Entry:
        model = case.load(setting.device)
        x, ids = case.points(n, setting.device)
        cost: list[Any] = []

        def call() -> None:
            cost[:] = [case.estimator.log_prob(model, x, items=ids).cost]

        call()  # what is copied or compiled once
        found = profiled(call, torch.device(setting.device))
        steps = cost[0].accepted_steps + cost[0].rejected_steps
        return {"items": n, "solver_steps": float(torch.as_tensor(steps, dtype=torch.float64).max()), **found}

    return each(setting, run)


def profiled(call: Callable[[], Any], device: torch.device) -> Entry:
    """Operators, numbers read from tensors, and on a GPU kernels, waits of the host and copies of a call.

    >>> found = profiled(lambda: float(torch.ones(2).sum()), torch.device("cpu"))
    >>> found["numbers_read"], found["kernels"], found["operators"] > 2
    (1, None, True)
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        call()
        timing.synchronise(device)
    rows = [(row.key, int(row.count), str(row.device_type)) for row in seen.key_averages()]
    on_gpu = [(key, count) for key, count, kind in rows if kind.endswith("CUDA")]
    kernels = sum(count for key, count in on_gpu if not key.startswith(NO_KERNELS))
    return {
        "operators": sum(count for key, count, _ in rows if key.startswith("aten::")),
        "numbers_read": sum(count for key, count, _ in rows if key == "aten::_local_scalar_dense"),
        "kernels": kernels if gpu else None,
        "copies": sum(count for _, count in on_gpu) - kernels if gpu else None,
        "host_waits": sum(count for key, count, _ in rows if key in WAITS) if gpu else None,
    }


def timings(setting: Setting) -> Iterator[Entry]:
    """Seconds a call and peak memory over batches; `forward_equivalents` are calls of the network that take as long."""
    device = torch.device(setting.device)

    def run(case: Case) -> Entry:
        model, found = case.load(setting.device), []
        for batch in BATCHES:
            n = setting.of(batch)
            x, ids = case.points(n, setting.device)

            def estimate(x: Any = x, ids: Any = ids) -> Any:
                return case.estimator.log_prob(model, x, items=ids)

            forward = timing.one_forward(model, x) or estimate
            rounds = ROUNDS if setting.full else 1
            measured = asdict(timing.measure(estimate, forward, items=n, rounds=rounds, device=device))
            found.append({"batch": n, **measured})
        return {"batches": found}

    return each(setting, run)
