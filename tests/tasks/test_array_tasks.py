"""Tasks of one's own arrays: what they hand out, what names them, and what they say of bad ones."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_files import LABELLED, TASK, write_task
from PIL import Image
from safetensors.torch import save_file

import flowlik
from flowlik.cells import Cell, Options
from flowlik.evaluation.controls import gaussian_log_density, low_rank_log_density
from flowlik.evaluation.models import load
from flowlik.references.make import make_reference
from flowlik.running.run import run_cell
from flowlik.tasks.arrays import REFERENCES_VARIABLE
from flowlik.tasks.own import task_file
from flowlik.tasks.own.fingerprint import fingerprint
from flowlik.tasks.own.moments import LEAST_SHARE, moments_of_rows
from flowlik.tasks.own.reading import rows
from flowlik.tasks.points import chunks, whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import get
from flowlik_models.synthetic import closed_form

NUMBERS = itertools.count()
LEVELS = np.random.default_rng(0).integers(0, 17, (40, 1, 4, 4)).astype(np.uint8)
MODEL = closed_form("gaussian-2d")
X = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def name() -> Iterator[str]:
    """An id that no other test has; files and modules are forgotten afterwards."""
    path = list(sys.path)
    yield f"own-{next(NUMBERS)}"
    task_file.forget()
    load.cache_clear()
    sys.modules.pop("field", None)
    sys.path[:] = path


def task_of(**changes: Any) -> flowlik.ArrayTask:
    given: dict[str, Any] = {"id": "arrays", "train": X, "test": X[:20], "models": {"net": MODEL}}
    return flowlik.ArrayTask(**given | changes)


class Field:
    """Anything of an event shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.event_shape = shape

    def velocity(self, x: torch.Tensor, t: torch.Tensor, *, cond: Any = None) -> torch.Tensor:
        return -x


# --- what they hand out -------------------------------------------------------------------------------------
class Columns:
    """What the data sets of the `datasets` library look like."""

    def __init__(self, **columns: Any) -> None:
        self.column_names = list(columns)
        self.columns = columns

    def __getitem__(self, key: str) -> Any:
        return self.columns[key]


def sources(folder: Path) -> dict[str, Any]:
    np.save(folder / "x.npy", LEVELS)
    np.savez(folder / "x.npz", x=LEVELS, label=np.arange(40))
    save_file({"image": torch.from_numpy(LEVELS), "label": torch.arange(40)}, folder / "x.safetensors")
    pictures = [Image.fromarray(image[0]) for image in LEVELS]
    return {
        "array": LEVELS,
        "tensor": torch.from_numpy(LEVELS),
        "npy": str(folder / "x.npy"),
        "npz": folder / "x.npz",
        "safetensors": folder / "x.safetensors",
        "mapping": {"x": LEVELS, "label": range(40)},
        "data set": Columns(image=pictures, label=list(range(40))),
    }


def test_every_kind_of_source_gives_the_same_items_and_the_same_hash(tmp_path: Path) -> None:
    tasks = [
        task_of(train=x, test=x, levels=17, models={"net": Field((1, 4, 4))})
        for x in sources(tmp_path).values()
    ]
    items = [whole(task.items("test", 10).x) for task in tasks]
    assert all(torch.equal(x, items[0]) for x in items)
    assert len({task.data_hash("test") for task in tasks}) == 1


@pytest.mark.parametrize("kind", ["npz", "safetensors", "mapping", "data set"])
def test_labels_are_a_column_of_the_same_source(tmp_path: Path, kind: str) -> None:
    x = sources(tmp_path)[kind]
    task = task_of(train=x, test=x, levels=17, labels="label", models={"net": Field((1, 4, 4))})
    items = task.items("test", 5, draws=2)
    assert items.cond is not None
    assert items.cond.tolist() == [0, 1, 2, 3, 4] * 2


def test_a_folder_of_images_is_shuffled_and_its_sub_folders_are_classes(tmp_path: Path) -> None:
    for number, image in enumerate(np.random.default_rng(1).integers(0, 256, (8, 6, 5, 3)).astype(np.uint8)):
        file = tmp_path / ("cats" if number < 4 else "dogs") / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        image[0, 0] = number
        Image.fromarray(image).save(file)
    net = {"net": Field((3, 6, 5))}
    task = task_of(train=tmp_path, test=tmp_path, levels=256, labels="folder", models=net)
    x = whole(task.items("test", 8).x)
    numbers = torch.floor((x[:, 0, 0, 0] + 1) * 128).long().tolist()
    cond = task.items("test", 8).cond
    assert cond is not None
    assert sorted(numbers) == list(range(8))
    assert numbers != sorted(numbers)
    assert [int(n >= 4) for n in numbers] == cond.tolist()
    assert x.shape == (8, 3, 6, 5)


def test_discrete_data_are_dequantised_by_row_and_draw_whatever_the_batch() -> None:
    task = task_of(train=LEVELS, test=LEVELS, levels=17, models={"net": Field((1, 4, 4))})
    items = task.items("test", 12, draws=3)
    x = whole(items.x).reshape(3, 12, 1, 4, 4)
    assert all(
        torch.equal(torch.floor((x[d].double() + 1) * 17 / 2).byte(), torch.from_numpy(LEVELS[:12]))
        for d in range(3)
    )
    assert not torch.equal(x[0], x[1])
    assert torch.equal(whole(task.items("test", 5).x), x[0, :5])
    assert not torch.equal(whole(task.items("train", 12).x), x[0])
    points = task._points
    assert torch.equal(
        torch.cat([points("test", 12, a, min(36, a + 5)) for a in range(0, 36, 5)]), whole(items.x)
    )
    assert [len(part) for part in chunks(items.x, 20)] == [20, 16]


def test_continuous_data_are_taken_as_they_are() -> None:
    assert torch.equal(whole(task_of().items("test", 100).x), X[:20])
    assert whole(task_of(train=X.double(), test=X.double()).items("test", 3).x).dtype == torch.float64
    assert not task_of().dequantises("test")


def test_samples_have_labels_in_the_shares_of_the_split() -> None:
    labels = torch.tensor([0] * 30 + [1] * 15 + [2] * 5)
    task = task_of(labels={"train": labels, "test": labels[:20]})
    drawn = task.sample_conditions("train", torch.arange(4000))
    assert drawn is not None
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)  # four standard errors
    later = task.sample_conditions("train", torch.arange(1000, 1010))
    assert later is not None
    assert torch.equal(later, drawn[1000:1010])
    assert task_of().sample_conditions("train", torch.arange(3)) is None


def test_a_known_truth_is_the_reference_of_every_model() -> None:
    task = task_of(log_prob=lambda x: MODEL.log_prob(x))
    items = task.items("test", 20)
    reference = task.reference("test", items, 1.0)
    assert np.allclose(reference.log_prob[0], MODEL.log_prob(X[:20].double()).numpy())
    assert task.splits == ("test", "train")
    with pytest.raises(ValueError, match="one value a row"):
        task_of(log_prob=lambda x: x).reference("test", items, 1.0)


# --- moments ------------------------------------------------------------------------------------------------
def test_moments_hold_the_noise_of_the_dequantisation_exactly() -> None:
    task = task_of(train=LEVELS, test=LEVELS, levels=17, models={"net": Field((1, 4, 4))})
    mean, covariance = task.moments()
    z = 2 * (LEVELS.reshape(40, -1) + 0.5) / 17 - 1
    noise = (2 / 17) ** 2 / 12
    assert np.allclose(mean, z.mean(0))
    assert np.allclose(covariance, np.cov(z, rowvar=False, bias=True) + noise * np.eye(16))


def test_moments_above_3072_dimensions_are_of_low_rank_and_keep_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = np.random.default_rng(0).integers(0, 256, (30, 3100)).astype(np.uint8)
    found = moments_of_rows(rows(x, "train"), 256, "made up")
    z = 2 * (x + 0.5) / 256 - 1
    assert found.rest is not None
    assert found.eigenvectors.shape == (3100, 1)
    trace = found.eigenvalues.sum() + found.rest * 3099
    expected = z.var(0).sum() + 3100 * (2 / 256) ** 2 / 12
    assert trace == pytest.approx(expected, rel=2 * LEAST_SHARE)
    assert np.allclose(found.mean, z.mean(0))


def test_fewer_rows_than_dimensions_give_no_covariance_that_fits_them_alone() -> None:
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(0))
    task = task_of(train=x[:100], test=x[100:], models={"net": Field((200,))})
    flat = whole(task.items("test", 300).x).double().numpy()
    nats = -gaussian_log_density(*task.moments())(flat).mean() / 200
    assert nats == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.05)


def test_directions_without_variance_get_a_millionth_of_the_mean_variance() -> None:
    x = X.clone()
    x[:, 1] = 3.0
    found = task_of(train=x, test=x).data_moments()
    variance = float(x[:, 0].double().var(correction=0))
    assert found.eigenvalues == pytest.approx([LEAST_SHARE * variance / 2, variance])


@pytest.mark.parametrize("t", [1.0, 0.9])
def test_the_gaussian_control_of_low_rank_is_that_of_its_whole_covariance(t: float) -> None:
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.standard_normal((6, 2)))[0]
    moments = flowlik.tasks.arrays.Moments(rng.standard_normal(6), np.array([2.0, 5.0]), vectors, "h", 0.3)
    covariance = vectors * (moments.eigenvalues - 0.3) @ vectors.T + 0.3 * np.eye(6)
    whole_density = gaussian_log_density(t * moments.mean, t**2 * covariance + (1 - t) ** 2 * np.eye(6))
    x = rng.standard_normal((7, 6))
    assert np.allclose(low_rank_log_density(moments, t)(x), whole_density(x))


# --- what names them ----------------------------------------------------------------------------------------
def test_the_data_hash_follows_values_order_type_levels_and_labels() -> None:
    other = X.clone()
    other[3, 1] += 1e-6
    zeros, ones = ({"train": torch.full((50,), k), "test": torch.full((50,), k)} for k in (0, 1))
    tasks = [
        task_of(test=X),
        task_of(test=other),
        task_of(test=X.flip(0)),
        task_of(test=X.double()),
        task_of(test=X, labels=zeros),
        task_of(test=X, labels=ones),
        *(task_of(train=LEVELS, test=LEVELS, levels=n, models={"net": Field((1, 4, 4))}) for n in (17, 18)),
    ]
    hashes = [task.data_hash("test") for task in tasks]
    assert len(set(hashes)) == len(hashes)
    assert task_of(test=X.clone()).data_hash("test") == hashes[0]
    assert task_of(test=X).data_hash("train") != hashes[0]


def test_a_fingerprint_follows_weights_settings_and_what_a_function_encloses() -> None:
    def net(weight: float, factor: float) -> Any:
        module = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(module.weight, weight)
        torch.nn.init.zeros_(module.bias)
        module.call = lambda x: factor * x
        return module

    names = [fingerprint(net(*given)) for given in ((1.0, 2.0), (1.5, 2.0), (1.0, 3.0), (1.0, 2.0))]
    assert names[0] == names[3]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("file", "before", "after", "same"),
    [
        ("mine.py", "models=", "# a word\n    models=", True),
        ("field.py", "import torch", "import torch  # a word", True),
        ("field.py", "t**2 * self", "1.1 * t**2 * self", False),
        ("mine.py", '{"net": Field}', '{"net": lambda: Field(scale=2.5)}', False),
    ],
)
def test_the_model_hash_follows_the_source_text_beside_the_file(
    tmp_path: Path, name: str, file: str, before: str, after: str, same: bool
) -> None:
    path = write_task(tmp_path, name)
    first = get_task(str(path)).load_model("net", "cpu")[1]
    task_file.forget()
    sys.modules.pop("field")
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after))
    again = get_task(str(path)).load_model("net", "cpu")[1]
    assert (again == first) == same


def test_forgotten_weights_are_at_least_the_same_in_every_process(tmp_path: Path) -> None:
    task = task_of(models={"net": lambda: _with_event(torch.nn.Linear(2, 2))})
    again = task_of(models={"net": lambda: _with_event(torch.nn.Linear(2, 2))})
    first, second = task.load_model("net", "cpu")[0], again.load_model("net", "cpu")[0]
    assert torch.equal(first.weight, second.weight)


def _with_event(module: Any) -> Any:
    module.event_shape = (2,)
    module.velocity = lambda x, t, cond=None: module(x)
    return module


def test_a_model_that_is_given_is_copied_not_changed() -> None:
    net = _with_event(torch.nn.Linear(2, 2)).train()
    task = task_of(models={"net": net})
    loaded, _ = task.load_model("net", "cpu")
    loaded.double()
    assert net.weight.dtype == torch.float32
    assert net.training
    assert not loaded.training


# --- through the harness ------------------------------------------------------------------------------------
def test_get_task_takes_a_file_and_then_its_id(tmp_path: Path, name: str) -> None:
    file = write_task(tmp_path, name)
    task = get_task(str(file))
    assert task.id == name
    assert get_task(name) is task
    assert get_task(str(file)) is task


def test_a_cell_of_a_file_is_right_and_says_why_it_has_no_error(tmp_path: Path, name: str) -> None:
    file = write_task(tmp_path, name)
    cell = Cell(task=name, task_file=str(file), model="net", estimator=get("ode", rtol=1e-7, atol=1e-7))
    row, arrays = run_cell(cell.with_options(n_items=100, rounds=0, dtype="float64"))
    x = whole(get_task(name).items("test", 100).x).double()
    truth = torch.distributions.Normal(1.0, 2.0).log_prob(x).sum(1).numpy()
    assert row["status"] == "ok"
    assert np.abs(arrays["log_prob"] - truth).max() < 1e-4
    assert row["bpd_error"] is None or np.isnan(row["bpd_error"])
    assert row["ref_id"] is None
    assert row["reason"] == f"no stored reference of {name}; make it with: flowlik reference mine.py"
    assert str(tmp_path) not in repr(row)


def labelled_truth(task: Any, n: int) -> np.ndarray:
    items = task.items("test", n)
    means = 3.0 * items.cond[:, None]
    values = torch.distributions.Normal(means, 2.0).log_prob(whole(items.x)).sum(1)
    return np.asarray(values.numpy())


@pytest.mark.parametrize("batch_size", [40, 7])
def test_labels_are_conditions_of_items_timing_and_samples(
    tmp_path: Path, name: str, batch_size: int
) -> None:
    file = write_task(tmp_path, name, LABELLED)
    cell = Cell(task=name, task_file=str(file), model="net", estimator=get("ode", solver="rk4", steps=64))
    options = Options(n_items=40, rounds=1, batch_size=batch_size, samples=600, density=True)
    row, arrays = run_cell(Cell(**{**vars(cell), "options": options}))
    assert row["status"] == "ok", row["reason"]
    assert np.abs(arrays["log_prob"] - labelled_truth(get_task(name), 40)).max() < 1e-3
    drawn = get_task(name).sample_conditions("test", torch.arange(64))
    assert drawn is not None
    offsets = arrays["samples"] - 3.0 * drawn.numpy()[:, None]
    assert abs(offsets.mean()) < 4 * 2 / np.sqrt(128)
    assert offsets.std() == pytest.approx(2.0, rel=0.3)


@pytest.mark.parametrize("stderr", [None, 0.05])
def test_a_reference_is_made_with_the_labels_and_found_until_the_data_change(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, stderr: float | None
) -> None:
    monkeypatch.setenv(REFERENCES_VARIABLE, str(tmp_path / "references"))
    monkeypatch.setattr("flowlik.references.exact.TEACHER_SAMPLES", 12)
    file = write_task(tmp_path, name, LABELLED)
    get_task(str(file))
    make_reference(name, tmp_path / "references", limit=12, stderr=stderr)
    cell = Cell(task=name, task_file=str(file), model="net", estimator=get("ode", rtol=1e-6, atol=1e-6))
    for split in ("test", "teacher-samples"):
        row, _ = run_cell(cell.with_options(split=split, n_items=12, rounds=0))
        assert row["status"] == "ok", row["reason"]
        assert row["ref_id"] == ("net-rk4-96-pooled" if stderr else "net-rk4-64")
        assert abs(row["bpd_error"]) < (4 * 0.05 / np.sqrt(12) if stderr else 1e-3)
    # other labels are other data
    task_file.forget()
    load.cache_clear()
    file.write_text(file.read_text().replace("manual_seed(0)", "manual_seed(5)"))
    row, _ = run_cell(cell.with_options(n_items=12, rounds=0))
    assert row["status"] == "ok"
    assert row["ref_id"] is None
    assert "make it again with: flowlik reference mine.py" in row["reason"]


# --- bad input ----------------------------------------------------------------------------------------------
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": (
        {"train": torch.full((4, 2), torch.nan)},
        "train: row 0 holds NaN or infinity; leave such rows out",
    ),
    "infinity": ({"test": torch.tensor([[0.0, 1.0], [np.inf, 0.0]])}, "test: row 1 holds NaN or infinity"),
    "whole numbers without levels": ({"train": torch.ones(4, 2, dtype=torch.int64)}, r"levels=256"),
    "floats with levels": ({"levels": 256}, r"float32, expected whole numbers 0\.\.255 .* \(x \* 255\)"),
    "outside the levels": ({"train": LEVELS + 9, "test": LEVELS, "levels": 17}, r"outside 0\.\.16"),
    "below the levels": (
        {"train": np.full((3, 2), -1), "test": np.ones((3, 2), int), "levels": 4},
        "-1, outside",
    ),
    "complex": ({"train": torch.ones(4, 2, dtype=torch.complex64)}, "complex64 values, expected floats"),
    "truth values": ({"train": torch.ones(4, 2, dtype=torch.bool)}, "bool values, expected floats"),
    "words": ({"train": ["a", "b"]}, "train: <U1 values"),
    "one number a row": ({"train": torch.ones(4)}, r"add a dimension, x\[:, None\]"),
    "other shapes": ({"test": torch.ones(4, 3)}, r"rows of shape \(2,\), test of \(3,\)"),
    "no rows": ({"test": torch.ones(0, 2)}, "test: no rows"),
    "labels of another length": (
        {"labels": {"train": range(50), "test": range(19)}},
        "19 of them for 20 rows",
    ),
    "labels of one split": ({"labels": {"train": range(50)}}, r'\{"train": ..., "test": ...\}'),
    "labels that are NaN": ({"labels": {"train": [np.nan] * 50, "test": [0.0] * 20}}, "hold NaN"),
    "no such column": ({"train": {"x": X, "y": X}, "labels": "z"}, "no such column"),
    "no model": ({"models": {}}, "expected at least one"),
    "a path as a model": ({"models": {"net": "net.pt"}}, "expected a model or a function"),
    "a bad id": ({"id": "../x"}, r"id '../x': expected letters"),
    "one level": ({"levels": 1}, "at least 2"),
    "eps": ({"eps": 1.0}, "below 1"),
    "an unknown reference model": ({"reference_model": "nett"}, "did you mean 'net'"),
    "no such file": ({"train": "nothere.npy"}, "nothere.npy: no such file"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_one_line_with_the_cure(case: str) -> None:
    changes, words = BAD_ARRAYS[case]
    with pytest.raises(ValueError, match=words) as caught:
        task_of(**changes)
    assert "\n" not in str(caught.value)


def test_arrays_of_python_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"train: x\.npy: .*pickled objects are not read"):
        task_of(train=tmp_path / "x.npy")
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(ValueError, match=r"train: x\.safetensors: cannot be read"):
        task_of(train=tmp_path / "x.safetensors")


BAD_FILES = {
    "no TASK": ("task = 1", r"mine\.py: no TASK in it; expected TASK = flowlik\.ArrayTask"),
    "another name": (TASK.replace("TASK =", "task ="), r"stands there as 'task': name it TASK"),
    "two": (TASK + "\nTASK = TASK\n", r"mine\.py: TASK is set 2 times \(lines 6 and 8\)"),
    "a list": (
        TASK + "\nTASK2 = TASK\nimport sys\nglobals()['TASK'] = [TASK]",
        "of type list, expected one task",
    ),
    "raises": ("x = 1\n1 / 0", r"mine\.py, line 2: ZeroDivisionError: division by zero"),
    "ends": ("import sys; sys.exit(3)", r"mine\.py, line 1: SystemExit: 3"),
    "no Python": ("TASK = (", r"mine\.py, line 1: no Python"),
    "a bad array": (
        TASK.replace("x[:300]", "x[:300] / 0"),
        r"mine\.py, line 6: train: row 0 holds NaN or infinity",
    ),
    "a built-in id": (TASK.replace("ID", "gmm-2d"), "id 'gmm-2d' is that of a built-in"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_line_that_names_the_file(tmp_path: Path, name: str, case: str) -> None:
    text, words = BAD_FILES[case]
    with pytest.raises(ValueError, match=words) as caught:
        get_task(str(write_task(tmp_path, name, text)))
    assert "\n" not in str(caught.value)


BAD_MODELS = {
    "a GPU": ('lambda: torch.nn.Linear(2, 2).to("cuda")', "no such GPU here: make it on the CPU"),
    "weights": (
        "lambda: Field().load_state_dict({'w': torch.ones(1)})",
        "the weights do not fit the network",
    ),
    "no model": (
        "lambda: torch.nn.Linear(2, 2)",
        r"of type Linear, without event_shape .* flowlik\.wrap\(net",
    ),
    "another shape": ("lambda: Field(dim=3)", r"has event_shape \(3,\), the data \(2,\)"),
    "raises when made": ("lambda: 1 / 0", r"mine\.py, line 6: model 'net': ZeroDivisionError"),
    "raises when evaluated": ("lambda: Field(mean='a')", r"mine\.py: model 'net' on 2 test rows: TypeError"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_models_are_one_line_that_names_the_file(tmp_path: Path, name: str, case: str) -> None:
    maker, words = BAD_MODELS[case]
    file = write_task(tmp_path, name, TASK.replace('{"net": Field}', f'{{"net": {maker}}}'))
    with pytest.raises(ValueError, match=words) as caught:
        get_task(str(file)).check(("net",), "cpu")
    assert re.match(r"mine\.py", str(caught.value))
    assert "\n" not in str(caught.value)


def test_two_files_of_one_id_are_an_error_that_names_both(tmp_path: Path, name: str) -> None:
    first, second = (write_task(tmp_path / folder, name) for folder in ("a", "b"))
    get_task(str(first))
    with pytest.raises(ValueError, match=f"{first} and {second} hold tasks of one id, '{name}'"):
        get_task(str(second))


def test_a_file_named_like_an_installed_module_hides_nothing(tmp_path: Path, name: str) -> None:
    file = write_task(tmp_path, name, name="statistics.py")
    import statistics

    assert get_task(str(file)).id == name
    assert statistics.mean([1, 3]) == 2
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("kind", [">f4", ">f8", "longdouble", "float16"])
def test_floats_of_any_byte_order_and_length_are_the_same_points(kind: str, tmp_path: Path) -> None:
    x = np.arange(12.0).reshape(6, 2)
    np.save(tmp_path / "x.npy", x.astype(kind))
    for given in (x.astype(kind), tmp_path / "x.npy"):
        task = flowlik.ArrayTask(
            id="kinds", train=x, test=given, models={"exact": closed_form("gaussian-2d")}
        )
        assert whole(task.items("test", 6).x).double().tolist() == x.tolist()


@pytest.mark.parametrize("kind", ["int8", "uint16", "uint32", "uint64", ">u2", ">i4"])
def test_levels_of_any_integer_type_get_the_same_noise(kind: str) -> None:
    k = np.arange(16).reshape(8, 2)
    points = []
    for given in (k, k.astype(kind)):
        task = flowlik.ArrayTask(
            id="kinds", train=given, test=given, levels=16, models={"exact": closed_form("gaussian-2d")}
        )
        points.append(whole(task.items("test", 8).x))
    assert torch.equal(*points)
    assert np.array_equal(np.floor((points[0].double().numpy() + 1) * 8), k)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"test": np.ma.masked_greater(np.arange(4.0).reshape(2, 2), 2)}, "test: masked values"),
        ({"test": np.zeros((2, 0))}, r"test: rows of shape \(0,\)"),
        ({"labels": ["a", "b"]}, "names become whole ones by np.unique"),
        ({"labels": np.array([0, 2**63], dtype=np.uint64)}, "beyond int64"),
        ({"labels": np.ma.masked_equal([0, 1], 1)}, "masked values"),
        ({"log_prob": lambda z: z.sum(1).long()}, "log_prob gives torch.int64"),
        ({"log_prob": lambda z: z.sum(1) * torch.nan}, "log_prob gives NaN"),
    ],
)
def test_what_would_be_taken_for_other_numbers_is_named(given: dict[str, Any], said: str) -> None:
    rows = np.arange(4.0).reshape(2, 2)
    options = {"train": rows, "test": rows, **given}
    if "labels" in given:
        options["labels"] = {"train": given["labels"], "test": given["labels"]}

    def asked() -> None:
        task = flowlik.ArrayTask(id="named", models={"exact": closed_form("gaussian-2d")}, **options)
        task.log_density(task.items("test", 2).x, 1.0)

    with pytest.raises(ValueError, match=said):
        asked()


def test_a_truth_that_writes_into_its_points_leaves_the_items_alone() -> None:
    rows = np.arange(8.0).reshape(4, 2)
    task = flowlik.ArrayTask(
        id="own",
        train=rows,
        test=rows,
        models={"exact": closed_form("gaussian-2d")},
        log_prob=lambda z: z.mul_(2.0).sum(1),
    )
    items = task.items("test", 4)
    task.log_density(items.x, 1.0)
    assert whole(items.x).tolist() == rows.tolist()


def test_pictures_with_a_palette_are_their_colours_and_those_of_16_bits_are_refused(tmp_path: Path) -> None:
    colours = np.array([[[0, 0, 0], [250, 10, 20]]], dtype=np.uint8)
    picture = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    given = {"image": [picture, picture]}
    task = flowlik.ArrayTask(
        id="palette", train=given, test=given, levels=256, models={"exact": closed_form("gaussian-2d")}
    )
    assert task.raw("test", 1)[0].movedim(0, -1).tolist() == colours.tolist()
    for k in range(2):
        Image.fromarray(np.full((2, 2), 300 + k, dtype=np.uint16)).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match="more than 8 bits a pixel"):
        flowlik.ArrayTask(
            id="deep", train=tmp_path, test=tmp_path, levels=256, models={"exact": closed_form("gaussian-2d")}
        )
