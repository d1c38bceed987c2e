"""Solved trajectories against a linear flow, whose map and log-determinant are known."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import NAME, PRETENDED, DeviceGenerator, to_pretended
from torch.overrides import TorchFunctionMode
from toy_flows import Linear

from flowlik_models.checkpoints import read_checkpoint, save_tensors
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import LOG_2PI
from flowlik_models.numerics.standard_normal import standard_normal_log_prob
from flowlik_models.objectives.batch import Batch
from flowlik_models.recipes.options import Trajectories
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training import preparation, trajectories
from flowlik_models.training.batches import trajectory_starts
from flowlik_models.training.process_group import Group
from flowlik_models.training.trajectories import TrajectoryPool, solve, solve_closed_form, stored_pool

RATES = torch.linspace(-0.5, 0.8, 64)


@pytest.fixture(scope="module")
def paths() -> TrajectoryPool:
    return solve(Linear(torch.diag(RATES), (1, 8, 8)), 30)


def test_states_follow_the_flow_both_ways_it_was_solved(paths: TrajectoryPool) -> None:
    assert paths.states.shape == (33, 30, 1, 8, 8)
    assert paths.own == 20
    assert bool((paths.times[0] == 1).all())
    assert bool((paths.times[-1] == 0).all())
    shrink = torch.exp((paths.times - 1)[:, :, None] * RATES)
    expected = shrink * paths.states[0].flatten(1)
    assert (paths.states.flatten(2) - expected).abs().max() < 2e-6 * expected.abs().max()


def test_log_determinants_are_integrals_from_the_data(paths: TrajectoryPool) -> None:
    expected = float(RATES.sum()) * (paths.times - 1)
    assert (paths.log_dets - expected).abs().max() < 1e-4


def test_pairs_hold_the_averages_of_either_order(paths: TrajectoryPool) -> None:
    batch = paths.pairs(5000, torch.Generator().manual_seed(0))
    assert batch.divergence is not None
    assert bool((batch.t != batch.s).all())
    # half start at the data, 15 % at the noise, the others at any of the 33 nodes, as often upwards as downwards
    assert float((batch.t == 1).float().mean()) == pytest.approx(0.5 + 0.35 / 33, abs=0.03)
    assert float((batch.t == 0).float().mean()) == pytest.approx(0.15 + 0.35 / 33, abs=0.02)
    assert float((batch.s < batch.t).float().mean()) == pytest.approx(0.5 + 0.35 / 2, abs=0.03)
    far = (batch.t - batch.s).abs() > 0.04
    assert (batch.divergence - RATES.sum())[far].abs().max() < 2e-3
    grown = batch.x.flatten(1) * torch.exp((batch.s - batch.t)[:, None] * RATES)
    moved = (batch.x + (batch.s - batch.t)[:, None, None, None] * batch.velocity).flatten(1)
    assert (moved - grown).abs().max() < 1e-5


def test_they_are_solved_once_and_kept(paths: TrajectoryPool, tmp_path: Path) -> None:
    file = tmp_path / "paths.safetensors"
    teacher = Linear(torch.diag(RATES), (1, 8, 8))
    made = stored_pool(file, lambda: solve(teacher, 6))
    again = stored_pool(file, lambda: pytest.fail("solved twice"))
    assert torch.equal(made.states, again.states)
    assert torch.equal(made.log_dets, again.log_dets)
    assert made.own == again.own == 4
    kept, _ = read_checkpoint(file)
    save_tensors(file, {name: kept[name] for name in ("times", "states", "log_dets", "own", "grid")})
    renewed = stored_pool(file, lambda: solve(teacher, 6))  # a file without what later versions keep
    assert torch.equal(made.states, renewed.states)
    assert read_checkpoint(file)[0].keys() == kept.keys()


def test_pools_of_the_recipes_are_stored_under_the_names_they_always_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def stored(file: Path, solved: Callable[[], TrajectoryPool], group: Group) -> TrajectoryPool:
        names.append(file.name)
        return TrajectoryPool(torch.zeros(1), torch.zeros(1), torch.zeros(1), 1)

    monkeypatch.setattr(preparation, "stored_pool", stored)
    for task, model in (("digits", "direct-f2d2"), ("fashion-mnist", "meanflow"), ("gmm-2d", "realuid")):
        preparation._pool_of_network(tmp_path, RECIPES[task][model], None, "weights", Group())
    for task in ("gmm-2d", "checkerboard-2d"):
        preparation.source_for(task, RECIPES[task]["direct-f2d2"], tmp_path, "cpu")
    assert names == [
        "teacher-paths-a359a595fffe.safetensors",
        "teacher-paths-552cfa19e6af.safetensors",
        "teacher-paths-68cb760b9112.safetensors",
        "paths-7677bbffdb8b.safetensors",
        "paths-7b2e8a901023.safetensors",
    ]


def test_an_interrupted_solve_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "_CHUNK", 8)
    teacher = Linear(torch.diag(RATES), (1, 8, 8))
    whole = solve(teacher, 30)
    file, parts = tmp_path / "paths.safetensors", tmp_path / "paths.parts"
    solved, original = [], trajectories._solved

    def counted(*arguments: Any) -> Any:
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(1)
        return original(*arguments)

    monkeypatch.setattr(trajectories, "_solved", counted)
    with pytest.raises(KeyboardInterrupt):
        stored_pool(file, lambda: solve(teacher, 30, folder=parts))
    assert len(list(parts.iterdir())) == 2
    monkeypatch.setattr(trajectories, "_solved", original)
    again = stored_pool(file, lambda: solve(teacher, 30, folder=parts))
    assert torch.equal(whole.states, again.states)
    assert torch.equal(whole.log_dets, again.log_dets)
    assert not parts.exists()


def test_processes_share_the_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that wait for each other as two processes would; each solves its half, both hold the whole."""
    monkeypatch.setattr(trajectories, "_CHUNK", 8)
    meeting, alone = threading.Barrier(2), solve(Linear(torch.diag(RATES), (1, 8, 8)), 30)
    count, original = {0: 0, 1: 0}, trajectories._solved

    class Waiting(Group):
        def wait(self) -> None:
            meeting.wait(timeout=60)

    def counted(*arguments: Any) -> Any:
        count[int(threading.current_thread().name)] += 1
        return original(*arguments)

    monkeypatch.setattr(trajectories, "_solved", counted)
    found: dict[int, TrajectoryPool] = {}

    def run(rank: int) -> None:
        group, teacher = Waiting(rank, 2), Linear(torch.diag(RATES), (1, 8, 8))
        found[rank] = stored_pool(
            tmp_path / "paths.safetensors",
            lambda: solve(teacher, 30, folder=tmp_path / "parts", group=group),
            group,
        )

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert count == {0: 3, 1: 2}
    for shared in found.values():
        assert torch.equal(shared.states, alone.states)
        assert torch.equal(shared.log_dets, alone.log_dets)
    assert (tmp_path / "paths.safetensors").is_file()


@pytest.mark.parametrize(
    ("task", "typical", "nine_in_ten"), [("gmm-2d", 2e-4, 2e-3), ("checkerboard-2d", 1e-4, 1e-3)]
)
def test_closed_forms_are_followed_to_their_exact_density(
    task: str, typical: float, nine_in_ten: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice what is measured, in nats, over sixteen draws of the nodes; at a sharp edge single errors are larger."""
    monkeypatch.setattr(trajectories, "_BLOCK", 16)
    monkeypatch.setattr(trajectories, "WRONG", math.inf)  # all are judged
    truth = closed_form(task)
    generator = torch.Generator().manual_seed(0)
    starts = truth.sample(256, generator=generator) * (1 - truth.eps)
    made = solve_closed_form(truth, starts, delta=5e-3, generator=generator)
    noise = made.states[-1].double()
    found = -0.5 * noise.square().sum(1) - LOG_2PI + made.log_dets[-1].double()
    errors = (found - truth.log_prob(starts.double(), 1 - truth.eps)).abs()
    assert float(errors.median()) < typical
    assert float(errors.quantile(0.9)) < nine_in_ten
    grid = made.times[list(made.grid)]
    expected = torch.linspace(1 - truth.eps, 0, 9)[:, None].expand(-1, 256)
    torch.testing.assert_close(grid, expected)


def test_half_of_the_pairs_are_steps_of_the_few_step_grids() -> None:
    """Of 1, 2, 4 and 8 steps, 5, 15, 15 and 15 %; the other half hits such a step by chance."""
    truth = closed_form("gmm-2d")
    generator = torch.Generator().manual_seed(0)
    made = solve_closed_form(truth, truth.sample(32, generator=generator), delta=5e-3, generator=generator)
    batch = made.pairs(20_000, generator)
    length, nodes = (batch.t - batch.s).abs(), len(made.times)
    for steps, share in ((1, 0.05), (2, 0.15), (4, 0.15), (8, 0.15)):
        step = 1 / steps
        on_grid = torch.isclose(length, torch.tensor(step)) & torch.isclose(batch.t % step, torch.zeros(()))
        by_chance = 0.5 * 2 * steps / (nodes * (nodes - 1))
        four_sigma = 4 * (share / 20_000) ** 0.5
        assert float(on_grid.float().mean()) == pytest.approx(share + by_chance, abs=four_sigma)


def test_wrong_trajectories_of_a_closed_form_are_solved_again_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the data of gmm-64d a step jumps over the layer where the nearest component changes: two in five."""
    truth, recipe = closed_form("gmm-64d"), RECIPES["gmm-64d"]["direct-f2d2"].with_options(altered=1.0)
    generator = torch.Generator().manual_seed(0)
    starts = trajectory_starts(truth, recipe, generator, 200)
    made = solve_closed_form(truth, starts, delta=5e-3, generator=generator)
    monkeypatch.setattr(trajectories, "SUBSTEPS", (1,))
    with_one = solve_closed_form(truth, starts, delta=5e-3, generator=generator)
    assert 80 < with_one.own < 140 < 155 < made.own < 200
    assert made.states.shape[1] == made.times.shape[1] == made.log_dets.shape[1] == made.own
    found = standard_normal_log_prob(made.states[-1]) + made.log_dets[-1]
    off = (found - truth.log_prob(made.states[0], 1 - truth.eps)).abs() / (64 * math.log(2.0))
    assert float(off.max()) < 1.01 * trajectories.WRONG
    monkeypatch.setattr(trajectories, "WRONG", 1e-9)
    with pytest.raises(ValueError, match=r"0 of 200 trajectories are within 1e-09 bits/dim"):
        solve_closed_form(truth, starts, delta=5e-3, generator=generator)


@pytest.mark.parametrize("grid", [True, False])
def test_pairs_lead_towards_the_noise_and_all_the_way_as_often_as_asked(
    paths: TrajectoryPool, grid: bool
) -> None:
    options = Trajectories(one_step=1.0, to_noise=0.8)
    made = replace(paths, grid=tuple(range(0, 33, 4))) if grid else paths
    batch = made.pairs(20_000, torch.Generator().manual_seed(0), options)
    assert float((batch.s < batch.t).float().mean()) == pytest.approx(0.8, abs=0.012)
    whole = ((batch.t - batch.s).abs() == 1).float().mean()
    assert float(whole) == pytest.approx(0.5 if grid else 0.2298, abs=0.012)


def test_rows_read_off_trajectories_get_no_derivative_term() -> None:
    t, s = torch.tensor([0.5, 0.2, 0.7]), torch.tensor([0.5, 0.9, 0.1])
    x = torch.zeros(3, 2)
    first = Batch(x, t, s, x, torch.zeros(3))
    assert first.moving().tolist() == [1, 2]
    joined = first.joined(Batch(x, t, s, x, torch.ones(3)))
    assert joined.moving().tolist() == [1, 2]
    assert joined.divergence is not None
    assert joined.divergence.tolist() == [0, 0, 0, 1, 1, 1]


def test_pairs_are_drawn_where_their_generator_is() -> None:
    """A generator of a device serves draws on that device alone."""

    class Devices(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            made = func(*args, **kwargs)
            if isinstance(kwargs.get("generator"), DeviceGenerator):
                assert made.device == kwargs["generator"].device, func
            return made

    times = torch.linspace(1, 0, 33)[:, None].expand(33, 4)
    states = times[..., None].expand(33, 4, 2).contiguous()
    to_pretended(times)  # skips where there is no such device
    pool = TrajectoryPool(times, states, times, 2, tuple(range(0, 33, 4)))
    with Devices():
        assert pool.to(PRETENDED).pairs(8, DeviceGenerator()).x.device.type == NAME
