"""What a user installs: the wheel holds the three packages, the shipped models and the stored results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "flowlik": ROOT / "benchmarks",
    "flowlik_estimators": ROOT / "estimators",
    "flowlik_models": ROOT / "models",
}
IGNORED = {"__pycache__"}
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    name = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    return zipfile.ZipFile(folder / name)


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not IGNORED & set(path.parts)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile, package: str) -> None:
    wanted = {f"{package}/{name}" for name in files_below(PACKAGES[package] / package)}
    assert f"{package}/__init__.py" in wanted
    assert f"{package}/py.typed" in wanted
    assert wanted <= set(wheel.namelist())


@pytest.mark.parametrize("kind", ["references", "baselines", "records"])
def test_wheel_carries_the_stored_results(wheel: zipfile.ZipFile, kind: str) -> None:
    wanted = {f"flowlik/_results/{kind}/{name}" for name in files_below(ROOT / "results" / kind)}
    assert wanted
    assert wanted <= set(wheel.namelist())


def test_wheel_carries_checkpoints_suites_and_templates(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    for pattern in (
        r"flowlik_models/checkpoints/[^/]+/[^/]+\.safetensors",
        r"flowlik_models/checkpoints/[^/]+/[^/]+\.json",
        r"flowlik/suites/quick\.toml",
        r"flowlik/report/page/templates/[^/]+",
    ):
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_wheel_installs_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "flowlik = flowlik.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_tools_are_pinned_to_the_same_versions_everywhere() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (ruff,) = (name for name in extras["dev"] if name.startswith("ruff"))
    tox = (ROOT / "tox.ini").read_text()
    assert f"    {ruff}\n" in tox
    assert "deps =\n    " + "\n    ".join(extras["docs"]) + "\n" in tox


def test_cpu_constraint_satisfies_the_declared_requirement() -> None:
    from packaging.requirements import Requirement

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = (Requirement(text) for text in declared if text.startswith("torch>"))
    pin = re.search(r"^torch==(\S+)$", (ROOT / "constraints-cpu.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert pin.group(1) in torch.specifier


class TestPipInstall:
    """`.ci/pip-install` with stand-ins for python, uname and nvidia-smi that note what they are asked."""

    @pytest.fixture
    def pip_install(self, tmp_path: Path):
        calls = tmp_path / "calls"

        def stand_in(name: str, body: str) -> None:
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)

        def run(
            *, torch: str = "", gpu: bool = False, fails: str = "", system: str = "Linux", **env: str
        ) -> tuple[int, list[str], str]:
            stand_in("uname", f"echo {system}")
            stand_in("nvidia-smi", f"exit {0 if gpu else 9}")
            stand_in(
                "python",
                f'if [ "$1" = - ]; then cat >/dev/null; echo {torch}; exit; fi\n'
                f'echo "$PIP_CONSTRAINT|$*" >>{calls}\n'
                f"for word in {fails or 'nothing'}; do\n"
                '  case " $* " in *" $word "*) echo "ERROR: not there" >&2; exit 1 ;; esac\n'
                "done",
            )
            calls.unlink(missing_ok=True)
            clean = {k: v for k, v in os.environ.items() if k not in {"FLOWLIK_TORCH", "PIP_CONSTRAINT"}}
            done = subprocess.run(
                ["sh", ".ci/pip-install", str(tmp_path / "python"), "-e", "."],
                cwd=ROOT,
                env=clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env,
                capture_output=True,
                text=True,
            )
            return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

        return run

    def test_without_gpu_the_cpu_build_comes_first_and_constrains_the_rest(self, pip_install) -> None:
        code, calls, _ = pip_install()
        assert code == 0
        assert len(calls) == 2
        assert "--no-index" in calls[0]
        assert calls[0].endswith("torch==2.13.0+cpu")
        assert calls[1] == "constraints-cpu.txt|-m pip install -e ."

    def test_the_public_cpu_index_is_asked_where_find_links_have_nothing(self, pip_install) -> None:
        code, calls, _ = pip_install(fails="--no-index")
        assert code == 0
        assert "--index-url https://download.pytorch.org/whl/cpu" in calls[1]
        assert len(calls) == 3

    def test_where_nobody_has_the_cpu_build_it_stops_with_one_line_and_the_cure(self, pip_install) -> None:
        code, calls, error = pip_install(fails="--no-deps")
        assert code == 1
        assert len(calls) == 2
        assert error.count("\n") == 1
        assert "FLOWLIK_TORCH=any" in error

    def test_an_acceptable_torch_stays(self, pip_install) -> None:
        _, calls, _ = pip_install(torch="2.9.1")
        assert calls == ["|-m pip install -e ."]

    @pytest.mark.parametrize("torch", ["", "2.13.0+cu130"])
    def test_with_a_gpu_nothing_is_constrained(self, pip_install, torch: str) -> None:
        assert pip_install(gpu=True, torch=torch)[1] == ["|-m pip install -e ."]
        assert pip_install(torch=torch, FLOWLIK_TORCH="any")[1] == ["|-m pip install -e ."]

    def test_elsewhere_than_on_linux_the_version_is_pinned(self, pip_install) -> None:
        assert pip_install(system="Darwin")[1] == ["constraints-cpu.txt|-m pip install -e ."]

    def test_an_unknown_choice_is_named(self, pip_install) -> None:
        code, calls, error = pip_install(FLOWLIK_TORCH="cuda")
        assert code != 0
        assert calls == []
        assert "any, cpu or auto" in error
