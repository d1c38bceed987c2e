"""A stranger's field distilled: objectives, networks, ends of its own, what is resumed, and the card."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from own_files import write_task
from safetensors.torch import load as read_safetensors
from torch import Tensor, nn
from toy_flows import Field, Linear
from typer.testing import CliRunner

import flowlik
from flowlik.cli import app
from flowlik.evaluation.models import load
from flowlik.scoring import distill as module
from flowlik.scoring.distill import distill, load_student
from flowlik.tasks.own import task_file
from flowlik_estimators import get
from flowlik_models import checkpoints
from flowlik_models.checkpoints import CheckpointError, read_checkpoint, read_tensors
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.distillation.pool import solved_pool
from flowlik_models.distillation.recipes import OBJECTIVES, recipe_of
from flowlik_models.distillation.teacher import Teacher
from flowlik_models.interfaces import can
from flowlik_models.training import trainer

quiet = partial(distill, say=lambda line: None)
RING = closed_form("gmm-2d")


def ring(n: int = 2000) -> Tensor:
    return RING.sample(n, generator=torch.Generator().manual_seed(0))


def trained(x: Tensor | None = None, teacher: Any = RING, **options: Any) -> Any:
    return quiet(teacher, ring() if x is None else x, **{"steps": 2, "pool": 64, **options})


def finite(student: Any, x: Tensor) -> bool:
    return bool(get("f2d2", steps=2).log_prob(student, x).valid.all())


@pytest.mark.parametrize("objective", [each for each in OBJECTIVES if each != "calibration"])
def test_every_objective_makes_a_joint_map_with_a_card(objective: str) -> None:
    student = trained(objective=objective)
    assert can(student, "joint flow map", "flow map", "velocity")
    assert finite(student, ring(16))
    found = student.card["accuracy"]
    assert list(found["steps"]) == ["1", "2", "4", "8"]
    assert all(row[name][1] > 0 for row in found["steps"].values() for name in ("mae", "bias"))
    truth = -RING.log_prob(ring().double()).mean() / (2 * math.log(2))
    assert found["bpd"][0] == pytest.approx(float(truth), abs=0.1)
    assert found["reference_error"] < 1e-3
    assert found["control-mean"]["bias"][0] == pytest.approx(0.0, abs=1e-6)


def test_a_few_seconds_of_direct_regression_are_better_than_a_constant() -> None:
    student = trained(steps=250, pool=2048)
    found = student.card["accuracy"]
    for steps in ("1", "8"):
        assert found["steps"][steps]["mae"][0] < 0.8 * found["control-mean"]["mae"][0]
    x = ring(500)
    error = get("f2d2", steps=1).log_prob(student, x).log_prob - RING.log_prob(x.double())
    assert float(error.abs().mean()) / (2 * math.log(2)) < 1.3 * found["steps"]["1"]["mae"][0]


def test_calibration_trains_the_head_of_a_student_alone(tmp_path: Path) -> None:
    student = trained()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    made = trained(objective="calibration", network=student)
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="give network=student"):
        trained(objective="calibration")


class TwoTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.cat((x, t[:, None], s[:, None]), 1))
        return out


class Joint(TwoTimes):
    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
        u = self(x, t, s)
        return u, u.sum(1)


def test_networks_of_ones_own_are_trained_and_get_a_head(tmp_path: Path) -> None:
    own = Joint()
    before = own.layer.weight.clone()
    student = trained(network=own)
    assert student is own
    assert not torch.equal(before, own.layer.weight)
    headed = trained(network=TwoTimes(), out=tmp_path)
    assert finite(headed, ring(8))
    again = load_student(tmp_path / "direct-f2d2.safetensors", RING, TwoTimes())
    x, t, s = ring(8), torch.ones(8), torch.zeros(8)
    assert torch.equal(again.joint(x, t, s)[1], headed.joint(x, t, s)[1])
    with pytest.raises(ValueError, match=r"network= failed on 2 rows.*two times"):
        trained(network=nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(6,), (2, 5), (1, 4, 4), (3, 6, 6)])
def test_the_suites_networks_fit_the_shape_of_the_data(shape: tuple[int, ...], tmp_path: Path) -> None:
    d = math.prod(shape)
    teacher = Linear(torch.diag(torch.linspace(-0.5, 0.5, d)), shape)
    x = torch.randn(300, *shape, generator=torch.Generator().manual_seed(0))
    student = trained(x, teacher, pool=16, out=tmp_path, held_out=x[:8])
    assert student.joint(x[:3], torch.ones(3), torch.zeros(3))[0].shape == (3, *shape)
    again = load_student(tmp_path / "direct-f2d2.safetensors", teacher)
    one, other = (get("f2d2", steps=2).log_prob(each, x[:4]).log_prob for each in (student, again))
    assert torch.equal(one, other)


def shifted_source() -> Any:
    """The field of N(0, 4 I), known from t = 0.3 to 0.95, with its exact law at 0.3."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.clamp(0.3, 0.95)[:, None]
        return (4 * t - (1 - t)) / (4 * t**2 + (1 - t) ** 2) * x

    class Law:
        variance = 4 * 0.3**2 + 0.7**2

        def log_prob(self, x: Tensor) -> Tensor:
            return torch.distributions.Normal(0.0, self.variance**0.5).log_prob(x.double()).sum(1)

        def sample(self, n: int, generator: torch.Generator) -> Tensor:
            return self.variance**0.5 * torch.randn(n, 2, generator=generator)

    return Field(velocity, noisy_end=0.3, clean_end=0.95, source=Law())


def test_a_field_with_ends_of_its_own_is_followed_between_them() -> None:
    teacher = shifted_source()
    x = 2 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    pool = solved_pool(Teacher.of(teacher), lambda n, g: x[:n], 64, own=0.25, delta=5e-3)
    assert pool.times[0, 0] == pytest.approx(0.95)
    assert pool.times[-1, 0] == pytest.approx(0.3)
    assert [round(float(pool.times[k, 0]), 5) for k in pool.grid] == [
        round(0.95 - 0.65 * k / 8, 5) for k in range(9)
    ]
    at, log_prob = pool.likelihoods(32, torch.Generator().manual_seed(0))
    variance = 4 * 0.95**2 + 0.05**2
    exact = torch.distributions.Normal(0.0, variance**0.5).log_prob(at.double()).sum(1)
    assert float((log_prob - exact).abs().max()) < 1e-3
    student = trained(x, teacher)
    assert (student.noisy_end, student.clean_end) == (0.3, 0.95)
    assert "source" not in "".join(student.state_dict())
    # the Gaussian map of the data's moments is nearly the answer before any training
    assert student.card["accuracy"]["steps"]["1"]["mae"][0] < 0.05
    for objective in ("meanflow", "lsd", "shortcut-distill", "calibration"):
        made = trained(
            x, teacher, objective=objective, network=student if objective == "calibration" else None
        )
        assert finite(made, x[:8])


def test_levels_are_dequantised_anew() -> None:
    rows = torch.randint(0, 4, (300, 3), generator=torch.Generator().manual_seed(0))
    teacher = Linear(0.1 * torch.eye(3))
    student = trained(rows, teacher, levels=4)
    found = student.card["accuracy"]
    z = 2 * (rows + 0.5) / 4 - 1
    assert found["bpd"][0] == pytest.approx(
        float(1 - teacher.log_prob(z).detach().mean() / (3 * math.log(2))), abs=0.1
    )
    with pytest.raises(ValueError, match=r"whole numbers 0\.\.2"):
        trained(rows, teacher, levels=3)


def test_what_was_interrupted_goes_on_and_what_is_finished_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(steps=8, out=tmp_path / "whole")
    solved, update = [], trainer._Training.update

    def stop(self: Any, loss: Tensor) -> None:
        if self.step == 5:
            self.save()
            raise KeyboardInterrupt
        update(self, loss)

    monkeypatch.setattr(trainer._Training, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(steps=8, out=tmp_path / "cut")
    monkeypatch.setattr(trainer._Training, "update", update)
    monkeypatch.setattr("flowlik_models.distillation.pool._block", lambda *_: solved.append(1))
    resumed = trained(steps=8, out=tmp_path / "cut")
    assert not solved
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = trained(steps=8, out=tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@cache
def of_another_teacher() -> tuple[Tensor, Any, Any]:
    """Points, their closed form, and what is distilled from it alone."""
    other = closed_form("thin-2d")
    x = other.sample(2000, generator=torch.Generator().manual_seed(0))
    return x, other, trained(x, other, steps=8)


def test_a_training_of_another_teacher_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, other, alone = of_another_teacher()
    with monkeypatch.context() as patch:  # in its judgement, when all is trained
        patch.setattr(module, "judged", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trained(steps=8, out=tmp_path / "both")
    second = trained(x, other, steps=8, out=tmp_path / "both")
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), second.parameters(), strict=True))
    assert second.card["accuracy"] == alone.card["accuracy"]


def test_a_card_of_other_weights_is_told_and_its_student_trained_again(tmp_path: Path) -> None:
    for seed, folder in ((0, "a"), (1, "b")):
        quiet(RING, ring(), steps=2, pool=64, seed=seed, out=tmp_path / folder)
    file, other = (tmp_path / folder / "direct-f2d2.safetensors" for folder in "ab")
    right = file.read_bytes()
    file.write_bytes(other.read_bytes())  # as where two trainings have one folder
    with pytest.raises(CheckpointError, match="the card of other weights"):
        load_student(file, RING)
    quiet(RING, ring(), steps=2, pool=64, out=tmp_path / "a")
    trained_again, before = read_tensors(file)[0], read_safetensors(right)
    assert trained_again.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in trained_again.items())


def test_a_card_without_its_weights_is_no_finished_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, other, alone = of_another_teacher()
    trained(steps=8, out=tmp_path / "both")
    with monkeypatch.context() as patch:  # between the card and the weights
        patch.setattr(checkpoints, "save_tensors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trained(x, other, steps=8, out=tmp_path / "both")
    second = trained(x, other, steps=8, out=tmp_path / "both")
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), second.parameters(), strict=True))


def test_minutes_decide_trajectories_and_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def seen(*_: Any, **__: Any) -> float:
        calls.append(1)
        return 0.01

    monkeypatch.setattr(module, "pace", seen)
    monkeypatch.setattr(module, "FEWEST_PATHS", 64)
    monkeypatch.setattr(module, "POOL_SHARE", 1e-9)
    monkeypatch.setattr(module, "fit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quiet(RING, ring(), minutes=0.05, out=tmp_path)
    assert len(calls) == 1
    (plan,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.plan.json"))
    assert plan["pool"] == 64
    assert 20 <= plan["steps"] <= 300


class NotEverywhere(nn.Module):
    """The ring's field, NaN right of a line."""

    event_shape = (2,)

    def __init__(self, line: float) -> None:
        super().__init__()
        self.line = line

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        return torch.where(x[:, :1] > self.line, math.nan, RING.velocity(x, t))


def test_a_teacher_of_colour_images_may_answer_in_any_memory_format() -> None:
    class Channels(nn.Module):
        event_shape = (3, 4, 4)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            return (-x).contiguous(memory_format=torch.channels_last)

    x = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pool = solved_pool(Teacher.of(Channels()), lambda n, g: x[:n], 8, own=0.5, delta=1e-2, nodes=4)
    assert pool.states.isfinite().all()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "objective": (lambda: trained(objective="distil"), "unknown objective 'distil'"),
    "no field": (lambda: trained(teacher=nn.Linear(2, 2)), "flowlik.wrap"),
    "shape": (lambda: trained(torch.randn(100, 3)), r"shape \(100, 3\), expected \(n, 2\)"),
    "NaN": (lambda: trained(ring() * math.nan), "NaN or infinity"),
    "few": (lambda: trained(ring(10)), "at least 20"),
    "NaN of the teacher": (
        lambda: trained(teacher=NotEverywhere(-math.inf)),
        "NaN or infinite at t = 0 in 16 of 16",
    ),
    "NaN of it here and there": (
        lambda: trained(teacher=NotEverywhere(1.5)),
        r"infinite at t = 0 in \d of 16",
    ),
    "minutes": (lambda: trained(minutes=0), "minutes must be positive"),
    "same rows": (lambda: trained(torch.ones(100, 2)), "all rows of train_x are the same"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_recipes_of_all_objectives_and_shapes_go_together() -> None:
    for objective in OBJECTIVES:
        for shape in ((2,), (64,), (3, 32, 32)):
            assert recipe_of(objective, shape).divergence


def test_a_file_is_distilled_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(write_task(tmp_path / "user", "cli-distil"))
    run = ("train", file, "direct-f2d2", "--steps", "2", "--minutes", "0.01", "--out", "out")
    monkeypatch.setattr(module, "TASK_ROWS", 200)
    done = CliRunner().invoke(app, [*run])
    try:
        assert done.exit_code == 0, done.output
        assert "f2d2, 8 steps: mean |error|" in done.output
        assert "control-mean" in done.output
        made = Path("out/cli-distil/direct-f2d2.safetensors")
        card = read_checkpoint(made)[1]
        assert card["task"] == "cli-distil"
        assert str(tmp_path) not in made.with_suffix(".json").read_text()
        done = CliRunner().invoke(app, [*run[:2], "direct-f2d2-calibrated", *run[3:]])
        assert done.exit_code == 0, done.output
        for words, said in (
            (("direct-f2d3",), "unknown student 'direct-f2d3'"),
            (("direct-f2d2", "--ship"), "built-in tasks"),
        ):
            done = CliRunner().invoke(app, ["train", file, *words])
            assert done.exit_code == 2
            assert said in done.output
        done = CliRunner().invoke(app, ["train", "gmm-2d", "direct-f2d2", "--minutes", "1"])
        assert (done.exit_code, "--steps" in done.output) == (2, True)
    finally:
        task_file.forget()


def test_students_of_a_file_are_found_by_name_and_judged_by_their_teachers_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWLIK_REFERENCES", "")
    monkeypatch.setenv("FLOWLIK_STUDENTS", "")
    file = write_task(tmp_path / "user", "of-mine")
    run = (
        "run",
        "-t",
        str(file),
        "-m",
        "direct-f2d2",
        "-e",
        "f2d2[steps=1|4]",
        "--limit",
        "20",
        "--no-report",
    )

    def flowlik_(*words: str) -> Any:
        task_file.forget()
        return CliRunner().invoke(app, list(words))

    try:
        done = flowlik_(*run, "--out", "none")
        assert done.exit_code == 2
        assert "no student direct-f2d2 yet; make it with: flowlik train mine.py direct-f2d2" in done.output
        monkeypatch.setattr(module, "TASK_ROWS", 200)
        for words in (
            ("train", str(file), "direct-f2d2", "--steps", "2", "--minutes", "0.01"),
            ("reference", str(file), "--limit", "20"),
            (*run, "--out", "out"),
        ):
            done = flowlik_(*words)
            assert done.exit_code == 0, done.output
        records = flowlik.read_records(Path("out/records.jsonl"))
        errors = records.set_index("estimator_label")["bpd_mae"]
        assert set(records["ref_id"]) == {"net-rk4-64"}
        for steps in (1, 4):  # hardly trained, it is the Gaussian with the moments of 200 rows
            assert 0 < errors[f"f2d2[steps={steps}]"] < errors["control-mean"] / 2
        assert "direct-f2d2" in flowlik_("list", "models", str(file)).output
        assert "direct-f2d2" not in flowlik_("check", str(file)).output

        file.write_text(file.read_text().replace("Field}", "lambda: Field(scale=1.9)}"))
        refused = "a student of another teacher"
        done = flowlik_(*run, "--out", "other")
        assert done.exit_code == 2
        (line,) = done.output.strip().splitlines()
        assert refused in line
        assert line.endswith("make it with: flowlik train mine.py direct-f2d2")
        done = flowlik_("run", "-t", str(file), "--limit", "20", "--no-report", "--out", "default")
        assert (done.exit_code, refused in done.output) == (0, True)
        assert "f2d2" not in set(flowlik.read_records(Path("default/records.jsonl"))["estimator"])
    finally:
        task_file.forget()
        load.cache_clear()


def test_the_page_of_the_checkerboard_runs_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "distil-your-own-model.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert max(len(block.splitlines()) for block in blocks) <= 30
    code = "\n".join(blocks).replace("N = 3000", "N = 150")
    code = code.replace("steps=16_000", "steps=60, pool=1024")
    assert "N = 150" in code
    assert "steps=60" in code
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    found = scope["student"].card["accuracy"]
    assert found["steps"]["8"]["mae"][0] < found["control-mean"]["mae"][0]
    model = scope["model"]
    again = flowlik.load_student("runs/checkerboard/direct-f2d2.safetensors", model)
    at = scope["x"][:4], torch.ones(4)
    assert torch.equal(again.velocity(*at), scope["student"].velocity(*at))


def test_a_checkpoint_that_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_student(tmp_path / "none.safetensors", RING)
    assert flowlik.load_student is load_student
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flowlik.distill is distill
