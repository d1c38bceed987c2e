"""Figures and tables of guided samples and of the uses show what stands in the records, and nothing without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import record, write_rows

from flowlik.report import frame as frames
from flowlik.report import numbers as printed
from flowlik.report.figures.kinds import draw_all
from flowlik.report.figures.samples.guidance import with_intervals
from flowlik.report.page.write import write_report
from flowlik.report.tables.run import render


def sampled(label: str, frechet: float, model: str = "meanflow-f2d2", **known: Any) -> dict[str, Any]:
    name, _, inside = label.partition("[")
    params = dict(part.split("=") for part in inside.rstrip("]").split(",")) if inside else {}
    numbers: dict[str, Any] = {"steps": 2, "updates": 1, "step_size": 0.05, "direction": "likelihood"}
    numbers = numbers if name == "self-guidance" else {"steps": 2}
    numbers |= {k: float(v) if k == "step_size" else v for k, v in params.items()}
    extra = {
        "frechet_lo": frechet - 0.4,
        "frechet_hi": frechet + 0.4,
        "samples_bpd": -0.5,
        "samples_bpd_se": 0.01,
    }
    extra["frechet_resampled"] = [frechet + 0.1 * k for k in range(-3, 4)]
    values = {"precision": 0.8, "recall": 0.7, "kid": 0.02, "frechet_se": 0.2, "extractor": "a classifier"}
    return record(
        estimator=name,
        estimator_label=label,
        cell_id=f"{model}{label}",
        task="digits",
        model=model,
        dim=64,
        steps=int(params.get("steps", 2)),
        params=numbers,
        extra=extra,
        frechet=frechet,
        n_samples=500,
        nfe_mean=3.0,
        vjp_mean=1.0,
        **(values | known),
    )


def guided_run(folder: Path) -> Path:
    sizes = (0.01, 0.05, 0.2)
    rows = [
        sampled(f"self-guidance[steps=2,step_size={size},direction={way}]", 4.0 + size)
        for size in sizes
        for way in ("likelihood", "prior", "random")
    ]
    rows.append(sampled("f2d2[steps=2]", 4.3))
    rows.append(sampled("ode[solver=euler,steps=1024]", 2.75, model="teacher"))
    write_rows(folder, rows)
    return folder


def test_guided_samples_have_a_figure_and_a_table(tmp_path: Path) -> None:
    names = {path.name for path in draw_all(guided_run(tmp_path))}
    assert "digits--guidance.png" in names
    text = render(frames.load(tmp_path), "md")
    assert "digits: samples" in text
    assert "2.75 \\[2.35, 3.15\\]" in text
    assert "0.290 \\[0.290, 0.290\\]" in text  # 4.3 - 4.01, and the resamples move together
    assert "−0.500 \\[−0.520, −0.480\\]" in text
    assert "bits/dim by steps" not in text  # no cell has a likelihood of its own
    assert "digits: samples" in write_report(tmp_path).read_text()


def test_the_distance_is_frechets_where_there_are_features_and_energy_elsewhere() -> None:
    frame = frames.prepare(
        frames.pd.DataFrame(
            [
                sampled("f2d2[steps=2]", 4.0),
                record(cell_id="x", extra={"energy_distance": 0.5, "energy_distance_se": 0.1}),
            ]
        )
    )
    frame = with_intervals(frame.sort_values("task"))
    assert frame["distance"].tolist() == [4.0, 0.5]
    assert frame["distance_lo"].tolist() == pytest.approx([3.6, 0.304])
    assert frame["distance_hi"].tolist() == pytest.approx([4.4, 0.696])


def test_seeds_are_a_mean_with_their_spread_and_an_inception_makes_an_fid(tmp_path: Path) -> None:
    rows = [
        sampled("f2d2[steps=2]", value, extractor="inception-2015-12-05") | {"cell_id": f"{k}", "seed": k}
        for k, value in enumerate((4.0, 5.0, 6.0))
    ]
    rows[1]["extra"]["samples_bpd"] = -0.7
    write_rows(tmp_path, rows)
    text = render(frames.load(tmp_path), "md")
    assert "| FID |" in " ".join(text.split())
    assert "| 5.00 ± 1.0 |" in " ".join(text.split())
    assert "−0.567 ± 0.12" in text
    assert "Means over up to 3 seeds and repeats; ± is the standard deviation over them." in text


def test_what_other_networks_or_fewer_samples_say_is_never_averaged() -> None:
    rows = [
        sampled("f2d2[steps=2]", 4.0) | {"cell_id": "a"},
        sampled("f2d2[steps=2]", 5.0, extractor="inception-2015-12-05") | {"cell_id": "b"},
        sampled("f2d2[steps=2]", 6.0) | {"cell_id": "c", "n_samples": 50},
    ]
    frame = frames.averaged(frames.prepare(frames.pd.DataFrame(rows)))
    assert sorted(frame["frechet"]) == [4.0, 5.0, 6.0]
    assert set(frame["row"]) == {"F2D2, 2 steps, a classifier", "F2D2, 2 steps, inception-2015-12-05"}


USES: dict[str, dict[str, Any]] = {
    "comparison": {
        "rescaled": {"kendall": 0.81, "kendall_lo": 0.6, "kendall_hi": 0.9, "spread": 0.05, "bias": 0.1},
        "rounded": {"kendall": -0.2, "kendall_lo": -0.4, "kendall_hi": 0.1, "spread": 0.02, "bias": 0.1},
    },
    "outliers": {
        "inverted": {"auroc": 0.97, "auroc_lo": 0.95, "auroc_hi": 0.99},
        "mnist": {"reason": "mnist is not here; set FLOWLIK_DATA"},
    },
    "importance": {
        **{"ess": 0.4, "ess_exact": 0.5, "mass": 1.1, "p": 0.0012, "p_exact": 0.001, "log_p_error": 0.18},
        **{"odds": 8.0, "odds_exact": 10.0, "log_odds_error": -0.22, "log_odds_se": 0.1, "points": 2000},
    },
    "gradient": {"cosine": 0.93, "cosine_p05": 0.8, "error": 0.2},
}


def used_run(folder: Path, use: str) -> Path:
    rows = [
        record(cell_id=f"{use}{n}", estimator_label=f"f2d2[steps={n}]", steps=n, nfe_mean=float(n), bpd=1.5)
        | {"extra": {use: USES[use]}}
        for n in (1, 2, 4)
    ]
    write_rows(folder, rows)
    return folder


@pytest.mark.parametrize(
    ("use", "shown"),
    [
        ("comparison", "0.81 \\[0.60, 0.90\\]"),
        ("outliers", "0.97 \\[0.95, 0.99\\]"),
        ("importance", "0.00120"),
        ("gradient", "0.930"),
    ],
)
def test_each_use_has_a_figure_and_a_table_of_its_own(tmp_path: Path, use: str, shown: str) -> None:
    names = {path.name for path in draw_all(used_run(tmp_path, use))}
    assert f"gmm-2d--{use}.png" in names
    assert not [other for other in USES if other != use and f"gmm-2d--{other}.png" in names]
    text = render(frames.load(tmp_path), "md")
    assert shown in text
    if use == "outliers":
        assert "Mnist is not here; set FLOWLIK_DATA." in text


def test_numbers_are_read_out_of_extra_by_their_path() -> None:
    frame = frames.pd.DataFrame({"extra": [{"a": {"b": 2}}, {"a": 1.0}, {}, {"a": {"b": None}}]})
    assert np.array_equal(printed.from_extra(frame, "a", "b"), [2.0, np.nan, np.nan, np.nan], equal_nan=True)
