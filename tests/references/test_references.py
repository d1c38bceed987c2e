"""The fixed rule converges to known densities, and a stored reference is believed only as long as it fits."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowlik.records.paths import results_dir
from flowlik.records.writing import write_arrays
from flowlik.references import card, exact, fixed_rk4, make
from flowlik.tasks import stored_references
from flowlik.tasks.digits import DigitsTask
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import UnavailableError, tensor_hash
from flowlik_models.closed_forms.catalogue import closed_form


@pytest.mark.parametrize(("task", "tolerance"), [("gaussian-2d", 1e-5), ("gmm-2d", 1e-3), ("thin-2d", 1e-2)])
def test_the_rule_converges_to_the_closed_form(task: str, tolerance: float) -> None:
    model = closed_form(task)
    x = model.sample(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = model.log_prob(x).numpy()
    coarse, fine = (
        np.abs(fixed_rk4.converged_log_prob(model, x, steps) - truth).mean() for steps in (32, 64)
    )
    assert fine < tolerance
    assert fine < coarse / 4


def test_nodes_run_from_the_data_end_to_noise_and_are_dense_near_the_data() -> None:
    _, t, slope = fixed_rk4.times_of(64, 1.0)
    assert (t[0], t[-1]) == (1.0, 0.0)
    assert (np.diff(t) < 0).all()
    assert 1.0 - t[1] < 2e-4
    r = np.linspace(-2, 6, 9)
    step = 1e-6
    rate = (fixed_rk4.RULE_TIME.time(r + step) - fixed_rk4.RULE_TIME.time(r - step)) / (2 * step)
    assert fixed_rk4.RULE_TIME.slope(r) == pytest.approx(rate, rel=1e-6)
    assert len(slope) == 65


def test_a_closed_form_needs_a_summary_only(tmp_path: Path) -> None:
    path = make.make_reference("gmm-2d", tmp_path)
    written = json.loads(path.read_text())
    assert written["bpd_mean"] == pytest.approx(1.541, abs=0.02)
    assert all(check["passed"] for check in written["checks"])
    assert len(written["checks"]) == 3


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stored reference of digits, in a folder that stands for the shipped ones."""
    task = get_task("digits")
    folder = tmp_path / "references"
    samples = torch.zeros(3, 1, 8, 8)
    arrays = {"teacher_samples": samples.numpy(), "teacher-samples_log_prob": np.arange(2.0)}
    splits = {"teacher-samples": {"x_hash": tensor_hash(samples[:2]), "error_bpd": 0.001}}
    for split in ("test", "train"):
        arrays[f"{split}_log_prob"] = np.arange(4.0)
        splits[split] = {"x_hash": tensor_hash(task.items(split, 4).x), "error_bpd": 0.001}
    write_arrays(folder / "digits.npz", arrays)
    import hashlib

    digest = hashlib.sha256((folder / "digits.npz").read_bytes()).hexdigest()
    written = {
        "model_hash": "now",
        "t_end": 1.0,
        "ref_id": "teacher-rk4",
        "arrays_sha256": digest,
        "splits": splits,
    }
    (folder / "digits.json").write_text(json.dumps(written))
    monkeypatch.setattr(stored_references, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(stored_references, "model_hash", lambda task, model: "now")
    stored_references.read_stored.cache_clear()
    yield folder
    stored_references.read_stored.cache_clear()


def test_stored_values_come_with_their_items_and_nothing_for_the_others(stored: Path) -> None:
    task = get_task("digits")
    reference = task.reference("test", task.items("test", 6, draws=2), 1.0)
    assert reference.log_prob.shape == (2, 6)
    assert reference.log_prob[0, :4].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert np.isnan(reference.log_prob).sum() == 8
    assert (reference.ref_id, reference.error) == ("teacher-rk4", 0.001)
    samples = task.items("teacher-samples", 10)
    assert samples.n == 3
    assert task.reference("teacher-samples", samples, 1.0).log_prob.shape == (1, 3)


def test_a_reference_of_another_teacher_is_not_used(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_references, "model_hash", lambda task, model: "later")
    task = get_task("digits")
    with pytest.raises(UnavailableError, match="flowlik reference digits --ship"):
        task.reference("test", task.items("test", 4), 1.0)


def test_samples_of_another_teacher_are_not_used(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_references, "model_hash", lambda task, model: "later")
    with pytest.raises(UnavailableError, match="is of model now, not later"):
        get_task("digits").items("teacher-samples", 2)


def test_a_reference_beside_the_users_own_checkpoints_goes_before_the_shipped_one(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "runs" / "train"
    monkeypatch.setenv("FLOWLIK_CHECKPOINTS", str(own))
    assert stored_references.stored("digits").file.parent == stored
    shutil.copytree(stored, own / "references")
    assert stored_references.stored("digits").file.parent == own / "references"
    monkeypatch.setattr(stored_references, "model_hash", lambda task, model: "later")
    task = get_task("digits")
    with pytest.raises(UnavailableError, match=f"flowlik reference digits --checkpoints {own}"):
        task.reference("test", task.items("test", 4), 1.0)


def test_a_reference_of_another_end_time_is_not_used(stored: Path) -> None:
    task = get_task("digits")
    with pytest.raises(UnavailableError, match="t = 1"):
        task.reference("test", task.items("test", 4), 0.99)


def edited(folder: Path, **changes: Any) -> None:
    """The card of `stored` with other entries, those of a split by ``test``."""
    known = json.loads((folder / "digits.json").read_text())
    known["splits"]["test"] |= changes.pop("test", {})
    (folder / "digits.json").write_text(json.dumps(known | changes))
    stored_references.read_stored.cache_clear()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"checks": [{"name": "halving", "passed": False}]},
            UnavailableError,
            r"failed its checks \(halving\)",
        ),
        ({"t_end": math.nan}, UnavailableError, "t = nan"),
        ({"test": {"n": 5}}, ValueError, "one value each of 5 points"),
        ({"test": {"error_bpd": math.nan}}, ValueError, "an error of 0 or more"),
        ({"test": {"error_bpd": -0.1}}, ValueError, "an error of 0 or more"),
        ({"test": {"cond_hash": "0123"}}, UnavailableError, "of other conditions of test"),
    ],
)
def test_a_card_that_was_edited_or_failed_its_checks_is_no_reference(
    stored: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    task = get_task("digits")
    edited(stored, checks=[{"name": "halving", "passed": True}], test={"n": 4})
    assert task.reference("test", task.items("test", 4), 1.0).error == 0.001
    edited(stored, **changes)
    with pytest.raises(error, match=message):
        task.reference("test", task.items("test", 4), 1.0)


def test_a_reference_of_other_labels_is_not_used(stored: Path) -> None:
    task = replace(get_task("digits"), labelled=True)  # type: ignore[type-var]
    items = task.items("test", 4)
    with pytest.raises(UnavailableError, match="other conditions"):
        task.reference("test", items, 1.0)
    assert items.cond is not None
    edited(stored, test={"cond_hash": tensor_hash(items.cond)})
    assert task.reference("test", items, 1.0).log_prob[0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_items_without_a_value_fail_the_card() -> None:
    assert card.check_finite("test", np.arange(3.0))["passed"]
    assert not card.check_finite("test", np.array([0.0, np.nan]))["passed"]


def test_points_other_than_stored_are_noticed(stored: Path) -> None:
    other = DigitsTask(
        id="digits", event_shape=(1, 8, 8), description="", splits=("test", "train", "teacher-samples"), key=1
    )
    with pytest.raises(ValueError, match="expected the points of test"):
        other.reference("test", other.items("test", 4), 1.0)


def test_damaged_arrays_are_noticed_and_named(stored: Path) -> None:
    (stored / "digits.npz").write_bytes((stored / "digits.npz").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"digits\.npz"):
        stored_references.stored("digits")
    (stored / "digits.json").write_text("{")
    with pytest.raises(ValueError, match=r"digits\.json"):
        stored_references.stored("digits")
    (stored / "digits.json").unlink()
    with pytest.raises(UnavailableError, match="flowlik reference digits"):
        stored_references.stored("digits")


def test_interrupted_work_is_used_again(tmp_path: Path) -> None:
    model = closed_form("gaussian-2d")
    x = torch.zeros(3, 2)
    said: list[str] = []
    for _ in range(2):
        values = exact._in_chunks(model, x, None, 4, 1.0, tmp_path, "test", "cpu", said.append)
    assert len(said) == 1
    assert len(values) == 3


def test_results_lie_in_the_source_tree() -> None:
    assert (results_dir() / "references").is_dir()
    assert (results_dir() / "baselines").is_dir()
