"""`flowlik device`: every part at a hundredth of the size, and what becomes of parts that go wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import fake_parts
import pytest
import torch
from pretended_device import PRETENDED
from typer.testing import CliRunner

from flowlik.checks.device import cases, estimators, run, training
from flowlik.checks.device.parts import PARTS
from flowlik.checks.device.run import FILE, Plan, run_parts
from flowlik.checks.device.setting import Setting
from flowlik.cli import app
from flowlik_estimators import available

FAKE = "fake_parts:PARTS"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A setting on the CPU, and few cases: the first of another kind each."""
    few = [case for case in cases.CASES if case[2].startswith(("f2d2[", "elbo"))]
    monkeypatch.setattr(cases, "CASES", few)
    monkeypatch.setattr(cases, "available", lambda: ["peer-zuko"])
    return Setting("cpu", 0.2, str(tmp_path))


def test_the_help_names_every_part() -> None:
    said = " ".join(CliRunner().invoke(app, ["device", "--help"]).output.split())
    assert ", ".join(PARTS) in said


def found(name: str, setting: Setting) -> list[dict[str, Any]]:
    entries = list(PARTS[name](setting))
    json.dumps(run.to_line({"entries": entries}).decode())
    return entries


def test_every_estimator_is_held_against_the_cpu_and_is_itself_there() -> None:
    entries = found("agreement", Setting("cpu", 60, ""))
    assert {entry["estimator"].partition("[")[0] for entry in entries} == set(available())
    ran = [entry for entry in entries if "skipped" not in entry]
    assert not [entry for entry in ran if "failed" in entry]
    for entry in ran:
        assert entry["items"] == 4
        assert entry["gap_nats_float32"] <= 1e-4
        assert entry["gap_nats_float64"] <= 1e-9
        assert entry["disagree_on_valid_float32"] == entry["disagree_on_valid_float64"] == 0
    assert all("pip install" in entry["skipped"] for entry in entries if "skipped" in entry)


def test_operators_are_counted_and_kernels_are_not_known_on_a_cpu(small: Setting) -> None:
    elbo, f2d2, zuko = found("synchronisations", small)
    assert f2d2["operators"] > f2d2["numbers_read"] > 0
    assert elbo["estimator"] == "elbo"
    assert f2d2["solver_steps"] == 1
    assert [f2d2[name] for name in ("kernels", "copies", "host_waits")] == [None] * 3
    assert "zuko" in zuko["estimator"]


def test_a_read_number_is_counted_once_and_an_operator_as_often_as_it_runs() -> None:
    x = torch.ones(3)
    once = estimators.profiled(lambda: x.add(1), torch.device("cpu"))
    thrice = estimators.profiled(lambda: [x.add(1) for _ in range(3)], torch.device("cpu"))
    read = estimators.profiled(lambda: (float(x[0]), bool(x[1] > 0)), torch.device("cpu"))
    assert thrice["operators"] == 3 * once["operators"]
    assert (once["numbers_read"], read["numbers_read"]) == (0, 2)


def test_batches_are_timed_with_their_memory(small: Setting) -> None:
    _, f2d2, _ = found("timings", small)
    assert [batch["batch"] for batch in f2d2["batches"]] == [1, 2, 10, 40]
    assert all(batch["wall_s_median"] > 0 and batch["peak_bytes"] > 0 for batch in f2d2["batches"])


def test_short_products_are_held_against_float64(small: Setting) -> None:
    full, short = found("precision", small)
    assert (full["tf32"], short["tf32"]) == (False, True)
    assert 0 < full["gap_nats"] < 1e-3
    assert full["velocity_gap"] < 1e-5
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("device", ["cpu", PRETENDED])
def test_a_forced_out_of_memory_is_survived_with_the_same_numbers(device: str) -> None:
    raised, survived = found("memory", Setting(device, 60, ""))
    assert raised["raises"] in ("RuntimeError", "OutOfMemoryError")
    assert survived["batch_used"] <= survived["fits"] < survived["batch"]
    assert survived["refused"] >= 1
    assert survived["gap_nats"] < 1e-4


def test_objectives_are_trained_with_their_rate_and_no_peak_is_made_up(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = training.representatives(("cifar10", "fashion-mnist", "digits"))
    objectives = {training.RECIPES[task][name].objective for task, name in kinds}
    assert objectives == {
        recipe.objective
        for task in ("cifar10", "fashion-mnist", "digits")
        for recipe in training.RECIPES[task].values()
    }
    assert kinds[0] == ("cifar10", "teacher")
    few = [("digits", name) for name in ("teacher", "realuid")]
    monkeypatch.setattr(training, "representatives", lambda tasks: few)
    entries = found("objectives", small)
    assert not [entry for entry in entries if "failed" in entry]
    for entry in entries:
        assert entry["steps"] == entry["of"] == 1
        assert entry["images_per_s"] > 0
        assert entry["utilisation"] is None
    assert [entry["flops_per_s"] is None for entry in entries] == [False, True]


def test_the_full_size_teacher_stops_in_time_and_goes_on(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STEPS", 3)
    clock = itertools.count()  # a report after every step
    monkeypatch.setattr("flowlik_models.training.trainer.time.monotonic", lambda: 2.0 * next(clock))
    first, *_ = found("cifar10", small)
    assert (first["steps"], first["of"], first["unfinished"]) == (1, 3, True)
    last, *_ = found("cifar10", Setting("cpu", 1e9, small.folder))
    assert (last["steps"], last["unfinished"]) == (3, False)
    assert (Path(small.folder) / "cifar10" / "teacher-full.safetensors").is_file()


def test_a_part_that_goes_wrong_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    quick = [name for name in fake_parts.PARTS if name != "hangs"]
    lines = {line["part"]: line for line in run_parts(Plan(parts=quick, folder=tmp_path, table=FAKE))}
    hanging = Plan(parts=["hangs"], seconds=1.0, folder=tmp_path, table=FAKE)
    lines |= {line["part"]: line for line in run_parts(hanging)}
    assert {name: line["status"] for name, line in lines.items()} == {
        **{"raises": "failed", "dies": "failed", "hangs": "timeout"},
        **{"goes-on": "unfinished", "half": "failed", "fine": "ok"},
    }
    assert lines["raises"]["reason"] == "RuntimeError: no kernel for this"
    assert lines["dies"]["reason"] == "the process ended with status 9"
    assert lines["hangs"]["reason"] == "no end within 1 s"
    assert [lines[name]["entries"] for name in ("raises", "dies", "hangs")] == [
        [{"items": k}] for k in (1, 2, 3)
    ]
    assert lines["fine"]["entries"] == [{"items": 4, "device": "cpu"}]
    assert not lines["fine"]["full_size"]
    written = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line) for line in written] == list(lines.values())
    again = {
        line["part"]: line["status"]
        for line in run_parts(Plan(parts=("fine", "half"), folder=tmp_path, table=FAKE))
    }
    assert again == {"half": "failed", "fine": "done before"}


def test_parts_done_on_another_device_are_not_done(tmp_path: Path) -> None:
    run.append_line(tmp_path / FILE, {"part": "fine", "status": "ok", "device": "cuda"})
    assert run.done(tmp_path / FILE, "cpu") == set()
    assert run.done(tmp_path / FILE, "cuda:1") == {"fine"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "memry"], "unknown part 'memry'; did you mean 'memory'?"),
        (["--time-limit", "soon"], "--time-limit 'soon': expected a duration"),
        (["--device", "cuda:77"], "device 'cuda:77' is not here"),
    ],
)
def test_what_is_wrong_with_the_words_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["device", "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    (line,) = result.output.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out" / FILE).exists()
