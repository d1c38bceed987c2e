"""A figure of one's own: what is chosen is drawn, in the size and form that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_run import record, write_rows
from matplotlib.figure import Figure

import flowlik_estimators
from flowlik.report import labels
from flowlik.report.figures.own import figure_of, inches, write_own


def _run(folder: Path, **known: Any) -> Path:
    rows = [
        record(cell_id=f"{task}{model}{n}", task=task, model=model, steps=n, nfe_mean=n, bpd=1.0)
        | {"estimator_label": f"f2d2[steps={n}]", "bpd_mae": 0.5 / n, "bpd_error": 0.1 / n}
        | {"forward_equivalents": 1.1 * n if n < 8 else known.get("last"), "work": n}
        for task in ("gmm-2d", "thin-2d")
        for model in ("direct-f2d2", "meanflow-f2d2")
        for n in (1, 2, 8)
    ]
    write_rows(folder, rows)
    return folder


def _titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.axison]


def test_tasks_measure_and_cost_are_those_asked_for(tmp_path: Path) -> None:
    figure = figure_of(_run(tmp_path), tasks=["thin-2d"], measure="bias", cost="work")
    (ax,) = (ax for ax in figure.axes if ax.axison)
    assert ax.get_title() == "thin-2d"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("bias (bits/dim)", "forwards + products\n(per sample)")
    points = {tuple(map(float, point)) for line in ax.lines for point in line.get_xydata()}
    assert points >= {(1, 0.1), (2, 0.05), (8, 0.0125)}
    assert _titles(figure_of(tmp_path)) == ["gmm-2d", "thin-2d"]


@pytest.mark.parametrize(
    ("width", "wide"), [("single", 3.45), ("double", 7.1), ("85mm", 85 / 25.4), ("120", 120 / 25.4)]
)
def test_a_figure_is_as_wide_as_asked(tmp_path: Path, width: str, wide: float) -> None:
    assert inches(width) == pytest.approx(wide)
    assert figure_of(_run(tmp_path), width=width).get_figwidth() == pytest.approx(wide)


def test_words_have_the_size_asked_for_and_the_legend_can_go(tmp_path: Path) -> None:
    figure = figure_of(_run(tmp_path), font_size=11, legend="none")
    assert figure.axes[0].xaxis.label.get_size() == 11
    assert figure.legends == []
    assert len(figure_of(tmp_path).legends) == 1


def test_every_format_is_written_the_same_again(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in write_own(_run(tmp_path), ["png", "pdf", "svg"])}
    assert sorted(first) == ["own-error-nfe.pdf", "own-error-nfe.png", "own-error-nfe.svg"]
    again = {path.name: path.read_bytes() for path in write_own(tmp_path, ["png", "pdf", "svg"])}
    assert again == first


def test_times_that_cannot_be_are_marked_and_missing_ones_are_said(tmp_path: Path) -> None:
    wrong = figure_of(_run(tmp_path / "a", last=0.89 * 8), cost="forwards", tasks=["gmm-2d"])
    words = [text.get_text() for text in wrong.legends[0].get_texts()]
    assert "time cannot be: below 0.9 of the forwards" in words
    right = figure_of(_run(tmp_path / "b", last=0.91 * 8), cost="forwards", tasks=["gmm-2d"])
    assert not any("cannot" in text.get_text() for text in right.legends[0].get_texts())
    missing = figure_of(_run(tmp_path / "c"), cost="forwards", tasks=["gmm-2d"])
    assert "2 not timed" in [text.get_text() for text in missing.axes[0].texts]
    never = figure_of(tmp_path / "c", cost="ms", tasks=["gmm-2d"])
    assert "not timed" in [text.get_text() for text in never.axes[0].texts]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "errors"}, "valid: error, bias"),
        ({"cost": "steps"}, "valid: nfe, work"),
        ({"legend": "left"}, "valid: below, right, none"),
        ({"methods": ["f3d3"]}, "f2d2"),
        ({"tasks": ["gmm-3d"]}, "gmm-2d, thin-2d"),
        ({"width": "3in"}, "single, double"),
        ({"width": "9999"}, "30 to 500"),
        ({"font_size": 2}, "4 to 24"),
        ({"measure": "frechet"}, "no results with Fréchet distance"),
    ],
)
def test_what_is_unknown_is_one_line_with_the_valid_ones(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as found:
        figure_of(_run(tmp_path), **options)
    assert "\n" not in str(found.value)


def test_an_unknown_format_names_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="png, pdf, svg"):
        write_own(_run(tmp_path), ["docx"])


def test_a_plug_in_brings_its_own_label_colour_marker_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        look: ClassVar = {"label": "My method", "colour": "#123456", "marker": "P", "line": "-."}

    class Wrong:
        look: ClassVar = {"label": "Wrong", "colour": "red; }", "marker": "no", "line": "wavy"}

    monkeypatch.setattr(flowlik_estimators, "available", lambda: {"mine": Mine, "wrong": Wrong})
    labels._plugged_in.cache_clear()
    mine, wrong = labels.method_named("mine"), labels.method_named("wrong")
    labels._plugged_in.cache_clear()
    assert (mine.label, mine.colour, mine.marker, mine.line) == ("My method", "#123456", "P", "-.")
    assert (wrong.label, wrong.colour, wrong.marker, wrong.line) == ("Wrong", labels.OTHER.colour, "d", "")
