"""Progress of a training, on a terminal and in plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from flowlik.running.registry import is_follower
from flowlik_models.training.trainer import Progress

PLAIN_LINE_EVERY = 30.0  # seconds


@contextmanager
def progress_of(title: str) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a plain line every half minute otherwise."""
    console = Console()
    if is_follower():
        yield lambda _: None
        return
    if not console.is_terminal:
        last = [-PLAIN_LINE_EVERY]

        def line(progress: Progress) -> None:
            if progress.step == progress.steps or progress.seconds - last[0] >= PLAIN_LINE_EVERY:
                last[0] = progress.seconds
                step = f"step {progress.step}/{progress.steps}"
                text = f"{title}: {step}  {_state(progress)}  {progress.seconds:.0f}s"
                console.print(text, soft_wrap=True, highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        row = bar.add_task(title, total=None)
        yield lambda progress: bar.update(
            row,
            completed=progress.step,
            total=progress.steps,
            description=f"{title}  {_state(progress)}",
        )


def _state(progress: Progress) -> str:
    """Loss, speed and error of the likelihood where they are known, and skipped steps where there are any."""
    text = f"loss {progress.loss:.4g}"
    if progress.flops is not None:
        text += f"  {progress.rate:.0f} images/s  {_operations(progress.flops)}FLOP/s"
    if progress.utilisation is not None:
        text += f" ({progress.utilisation:.0%} of the bf16 peak)"
    if progress.validation is not None:
        text += f"  error {progress.validation:.3g} bits/dim"
    return text + (f"  {progress.skipped} skipped" if progress.skipped else "")


def _operations(flops: float) -> str:
    """Operations a second with a prefix, up to where `FLOP/s` goes on."""
    for prefix, size in (("P", 1e15), ("T", 1e12)):
        if flops >= size:
            return f"{flops / size:.3g} {prefix}"
    return f"{flops / 1e9:.3g} G"
