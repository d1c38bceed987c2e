"""The command line as a user meets it: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sizes import figure
from typer.testing import CliRunner

import flowlik
from flowlik.cli import app
from flowlik.commands.units import parse_duration, parse_seeds
from flowlik.tasks.stored_references import own_checkpoints

TINY = """
[defaults]
n_items = 20
batch_size = 20
rounds = 1
timing_batch = 8
[[cells]]
tasks = ["gaussian-2d"]
models = ["closed-form"]
estimators = ["f2d2[steps=1|2]"]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return str(file)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_run_writes_records_as_it_goes(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("run", tiny, "--out", str(out), "--no-report")
    assert result.exit_code == 0, result.output
    frame = flowlik.read_records(out)
    assert frame["status"].tolist() == ["ok"] * 5
    assert frame["estimator_label"].tolist()[:2] == ["f2d2[steps=1]", "f2d2[steps=2]"]
    note = json.loads((out / "run.json").read_text())
    assert note["finished"] >= note["started"]
    assert note["cells"] == {"ok": 5}
    assert "[5/5]" in result.output
    assert "5 cells: 5 ok" in result.output


def test_a_folder_with_records_is_gone_on_with_only_when_asked(tiny: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert call("run", tiny, "--out", out, "--no-report", "--limit", "5").exit_code == 0
    again = call("run", tiny, "--out", out, "--no-report", "--limit", "5")
    assert again.exit_code == 2
    assert "--resume" in again.output
    resumed = call("run", tiny, "--out", out, "--no-report", "--limit", "5", "--resume")
    assert resumed.exit_code == 0
    assert "5 done before" in resumed.output


def test_resume_needs_the_folder_of_the_run(tiny: str) -> None:
    result = call("run", tiny, "--resume")
    assert result.exit_code == 2
    assert "name its folder by --out" in result.output


def test_models_are_chosen_by_patterns(tiny: str) -> None:
    chosen = call("run", "few-steps", "--dry-run", "-t", "gmm-2d", "-m", "realuid-d*")
    assert chosen.exit_code == 0
    cells = [line.split(" · ") for line in chosen.output.splitlines() if line.count(" · ") > 1]
    assert {model for _, model, what in cells if "control" not in what} == {
        "realuid-data",
        "realuid-data-free",
    }
    nothing = call("run", tiny, "--dry-run", "-m", "open-*")
    assert nothing.exit_code == 2
    assert "unknown model of task 'gaussian-2d' 'open-*'" in nothing.output


def test_a_suite_file_that_is_not_there(tmp_path: Path) -> None:
    result = call("run", str(tmp_path / "few.toml"))
    assert result.exit_code == 2
    assert "few.toml: no such file" in result.output


def test_help_shows_the_parameters_of_an_estimator() -> None:
    assert "'f2d2[steps=1|2|4|8]'" in " ".join(call("run", "--help").output.split())


def test_contract_tests_of_one_estimator() -> None:
    result = call("check", "--plugins", "--only", "meanflow")
    assert result.exit_code == 0, result.output
    assert "meanflow" in result.output
    assert "pi-flow" not in result.output
    for words in (("--plugins", "--update"), ("--plugins", "--only", "no-such")):
        assert call("check", *words).exit_code == 2


def test_a_failed_cell_gives_exit_status_1(tmp_path: Path, tiny: str) -> None:
    chosen = ("-t", "gmm-2d", "-m", "closed-form", "-e", "f2d2[steps=1]")
    result = call("run", tiny, *chosen, "--no-report", "--out", str(tmp_path / "o"))
    assert result.exit_code == 1
    assert "refused" in result.output
    assert flowlik.read_records(tmp_path / "o")["reason"].notna().sum() == 1


def test_dry_run_only_lists(tiny: str, tmp_path: Path) -> None:
    result = call("run", tiny, "--dry-run", "--seeds", "0-2", "--out", str(tmp_path / "none"))
    assert result.exit_code == 0
    assert "9 cells" in result.output
    assert not (tmp_path / "none").exists()


def test_estimators_on_the_command_line_take_the_models_they_fit() -> None:
    result = call("run", "-e", "ode[solver=euler,steps=2,trace=closed]", "-t", "gmm-2d", "--dry-run")
    assert result.exit_code == 0
    assert "gmm-2d · closed-form · ode[solver=euler,steps=2,trace=closed]" in result.output
    assert "meanflow · ode" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "quikc"), "did you mean 'quick'"),
        (("run", "-t", "gmm2d"), "did you mean 'gmm-2d'"),
        (("run", "-e", "f2d3"), "f2d2"),
        (("run", "-e", "f2d2[step=1]"), "steps"),
        (("run", "-e", "ode[solver=dopri6]"), "dopri5"),
        (("run", "-e", "f2d2[steps=1", "-t", "gmm-2d"), "cannot read"),
        (("run", "-t", "gmm-2d", "-m", "meanflo"), "did you mean 'meanflow'"),
        (("run", "--seeds", "4-0"), "0-4"),
        (("run", "--timeout", "soon"), "30m"),
        (("run", "--device", "tpu"), "valid: auto, cpu"),
        (("run", "--executor", "rya"), "did you mean 'ray'"),
        (("run", "--address", "auto"), "add --executor ray"),
        (("run", "--memory", "8"), "at least 1G"),
        (("merge", "nowhere", "--out", "elsewhere"), "nowhere"),
        (("reproduce", "0123", "--in", "nowhere"), "nowhere"),
        (("list", "estimator"), "did you mean 'estimators'"),
        (("train", "gmm-2d", "teacherr"), "valid: "),
        (("train", "gmm-2", "meanflow"), "did you mean 'gmm-2d'"),
        (("reference", "gmm-2dd"), "did you mean 'gmm-2d'"),
        (("table", "nowhere"), "nowhere"),
        (("figures", "nowhere"), "nowhere"),
        (("report", "nowhere"), "nowhere"),
        (("compare", "nowhere", "elsewhere"), "nowhere"),
        (("gallery", "nowhere"), "nowhere"),
        (("table", "nowhere", "--format", "mdd"), "did you mean 'md'"),
        (("check", "--only", "no such gate"), "no gate contains"),
    ],
)
def test_bad_usage_is_one_line_and_exit_status_2(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("kind", ["estimators", "tasks", "models", "suites"])
def test_list_prints_what_there_is(kind: str) -> None:
    expected = {"estimators": "f2d2", "tasks": "gmm-64d", "models": "closed-form", "suites": "quick"}[kind]
    assert expected in call("list", kind).output
    assert expected in json.dumps(json.loads(call("list", kind, "--json").output))


def test_data_says_what_is_where(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    found = json.loads(call("data", "--data-dir", str(tmp_path), "--json").output)
    assert found["mnist"]["state"] == "missing"
    assert found["cifar10"]["state"] == "missing"
    assert "scikit-learn" in found["digits"]["detail"]


def test_sysinfo_names_versions_and_no_path_of_the_machine() -> None:
    text = call("sysinfo", "--json").output
    assert json.loads(text)["versions"]["torch"]
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert str(Path(__file__).parents[2]) not in text


def test_absolute_paths_are_left_out_of_the_command_line() -> None:
    from flowlik.records.environment import plain_argument

    assert plain_argument("/home/someone/runs/a") == "a"
    assert plain_argument("--out=/home/someone/runs/a") == "--out=a"
    assert plain_argument("ode[solver=dopri5]") == "ode[solver=dopri5]"


def test_check_prints_verdicts_and_fails_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flowlik.checks import gates

    entry = {
        "id": "few", "task": "gaussian-2d", "model": "closed-form", "estimator": "f2d2[steps=2]", "n_items": 10,
        "column": "nfe_mean", "max": 2,
    }  # fmt: skip
    (tmp_path / "baselines").mkdir()
    file = tmp_path / "baselines" / "some.json"
    monkeypatch.setattr(gates, "results_dir", lambda: tmp_path)
    file.write_text(json.dumps({"gates": [entry]}))
    fine = call("check", "--device", "cpu")
    assert fine.exit_code == 0
    assert "1 checks: 1 passed" in fine.output
    file.write_text(json.dumps({"gates": [entry | {"max": 1}]}))
    bad = call("check", "--device", "cpu", "--update")
    assert bad.exit_code == 1
    assert "nfe_mean 2 (<= 1)" in bad.output
    assert json.loads(file.read_text())["gates"][0]["measured"] == 2.0


def test_seeds_and_durations() -> None:
    assert parse_seeds("0-2,5") == (0, 1, 2, 5)
    assert (parse_duration("90"), parse_duration("1.5m"), parse_duration("2h")) == (90.0, 90.0, 7200.0)


def test_importing_the_package_is_quick_and_brings_no_torch() -> None:
    code = "import flowlik, sys; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_end_to_end_in_a_process_of_its_own(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flowlik", "run", tiny, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"\[\d/5\] ok ", line)]
    assert len(lines) == 5
    assert "\x1b" not in done.stdout
    for name in (
        "records.jsonl",
        "environments.jsonl",
        "run.json",
        "table.md",
        "table.tex",
        "table.csv",
        "report.html",
    ):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "figures").glob("*.png"))
    assert list((out / "figures").glob("*.pdf"))
    (environment_row,) = [json.loads(line) for line in (out / "environments.jsonl").read_text().splitlines()]
    assert str(tmp_path) not in json.dumps(environment_row)
    assert set(flowlik.read_records(out)["env_id"]) == {environment_row["env_id"]}


def test_the_index_of_list_is_what_the_registries_say() -> None:
    from flowlik.commands import listing
    from flowlik_estimators import available

    stored, found = json.loads(listing.INDEX.read_text()), listing.registries()
    for name, kind in available().items():
        if not kind.__module__.startswith("flowlik_estimators"):  # of another test
            found["estimators"].pop(name)
    assert stored == found, "out of date; write it anew with: python -m flowlik.commands.listing"


def test_list_asks_the_registries_where_the_index_may_be_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flowlik.commands import listing

    monkeypatch.setattr(listing, "INDEX", tmp_path / "listing.json")
    for text, age in (("", 0), ("{", 0), ("{}", 10**7)):
        if text:
            listing.INDEX.write_text(text)
            os.utime(listing.INDEX, (0, listing.INDEX.stat().st_mtime - age))
        assert "f2d2" in listing.listed("estimators")


def test_list_answers_without_torch() -> None:
    def seconds(*arguments: str) -> tuple[float, float, str]:
        before, begun = os.times(), time.monotonic()
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
        after = os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])
        return time.monotonic() - begun, cpu, done.stdout

    wall, cpu, _ = seconds("-c", "import flowlik")
    figure("import flowlik", f"{wall:.2f} s ({cpu:.2f} s of CPU)", "0.3 s")
    wall, cpu, said = seconds(
        "-c",
        "import sys; from flowlik.cli import app; from flowlik.commands import listing; "
        "listing.FRESH_SECONDS = float('inf')  # where a source was just edited the registries would be asked\n"
        "app(['list'], standalone_mode=False); print('torch' in sys.modules)",
    )
    figure("flowlik list", f"{wall:.2f} s ({cpu:.2f} s of CPU)", "1.5 s")
    assert "gmm-64d" in said
    assert said.splitlines()[-1] == "False"  # test_light_start.py counts the other libraries


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("check", "--plugins", "--device", "cpu"), 2),
        (("data", "get", "mnist", "--data-dir", ".", "--json"), 2),
        (("train", "digits", "features", "--accumulate", "2"), 2),
        (("reference", "gmm-2d", "--limit", "9"), 1),
    ],
)
def test_an_option_without_effect_is_refused(words: tuple[str, ...], status: int) -> None:
    result = call(*words)
    assert result.exit_code == status
    assert len(result.stderr.strip().splitlines()) == 1
    assert words[-2] in result.output or words[-1] in result.output


def test_training_is_judged_by_a_reference_beside_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flowlik reference --checkpoints runs/train` puts it there; without it a card has no errors."""
    looked_in: list[Path | None] = []

    def trained(task: str, model: str, *, out: Path, **_: object) -> Path:
        looked_in.append(own_checkpoints())
        return out

    monkeypatch.setattr("flowlik.training.train.train_model", trained)
    monkeypatch.setenv("FLOWLIK_CHECKPOINTS", "")
    assert call("train", "digits", "direct-f2d2", "--out", str(tmp_path)).exit_code == 0
    (tmp_path / "references").mkdir()
    assert call("train", "digits", "direct-f2d2", "--out", str(tmp_path)).exit_code == 0
    assert looked_in == [None, tmp_path]
