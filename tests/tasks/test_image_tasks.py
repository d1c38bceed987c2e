"""Tasks on images: skipped where the files are missing, exact on the mixtures, never larger in memory than a batch."""

from __future__ import annotations

from pathlib import Path

import image_files
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flowlik.cells import Options
from flowlik.cli import app
from flowlik.evaluation.batching.batches import evaluate
from flowlik.planning import suites
from flowlik.running.run import run_cell
from flowlik.tasks.image_mixtures import ImageMixtureTask
from flowlik.tasks.images import ImageTask
from flowlik.tasks.points import Points, chunks, whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import get
from flowlik_models.closed_forms import image_mixtures, shared_basis
from flowlik_models.closed_forms.image_mixtures import fit, image_mixture
from flowlik_models.images import CATALOG
from flowlik_models.images.folders import CACHE_VARIABLE, DATA_VARIABLE
from flowlik_models.moments.images import moments_of, noise_variance

CLOSED = "ode[solver=midpoint,steps=4,trace=closed]"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny Fashion-MNIST."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOG, "fashion-mnist", image_files.write_idx(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))


# --- fitting ------------------------------------------------------------------------------------------------


def test_moments_add_the_noise_of_the_dequantisation_exactly() -> None:
    levels, _ = image_files.images(60, (3, 4))
    found = moments_of(lambda: [levels[:25], levels[25:]], 256, "-")
    z = (2 * (levels.reshape(60, 12) + 0.5) / 256 - 1).astype(np.float64)
    covariance = np.cov(z, rowvar=False, bias=True) + np.eye(12) * (2 / 256) ** 2 / 12
    assert found.mean == pytest.approx(z.mean(0), abs=1e-12)
    assert found.eigenvectors * found.eigenvalues @ found.eigenvectors.T == pytest.approx(
        covariance, abs=1e-12
    )


def test_a_fit_without_sweeps_has_the_moments_of_each_class() -> None:
    levels, labels = image_files.images(200, (3, 4))
    moments = moments_of(lambda: [levels], 256, "-")
    found = fit(lambda: [levels], torch.from_numpy(labels.astype(np.int64)), 256, moments, sweeps=0)
    y = (2 * (levels.reshape(200, 12) + 0.5) / 256 - 1 - moments.mean) @ moments.eigenvectors
    for k in range(10):
        mine = y[labels == k]
        assert found.offsets[k].numpy() == pytest.approx(mine.mean(0), abs=1e-6)
        assert found.spectra[k].numpy() == pytest.approx(mine.var(0) + noise_variance(256), rel=1e-3)
    assert found.weights.tolist() == pytest.approx([0.1] * 10)


def test_sweeps_raise_the_likelihood_and_variances_stay_above_the_noise() -> None:
    levels, labels = image_files.images(400, (3, 4))
    levels[:, 0, 0] = 7  # a pixel that never changes
    moments = moments_of(lambda: [levels], 256, "-")
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(400, 12, generator=generator, dtype=torch.float64)
    z = 2 * (torch.from_numpy(levels).flatten(1) + uniforms) / 256 - 1
    scores = []
    for sweeps in (0, 4, 12):
        found = fit(lambda: [levels], torch.from_numpy(labels.astype(np.int64)), 256, moments, sweeps=sweeps)
        assert float(found.spectra.min()) >= noise_variance(256)
        assert float(found.spectra.min()) == pytest.approx(noise_variance(256), rel=1e-3)
        basis = torch.from_numpy(moments.eigenvectors)
        means = torch.from_numpy(moments.mean) + found.offsets @ basis.T
        mixture = shared_basis.SharedBasisMixture(found.weights, means, found.spectra, basis, (12,))
        scores.append(float(mixture.log_prob(z).mean()))
    assert scores[0] < scores[1] <= scores[2] + 1e-3


def test_a_class_without_images_is_refused() -> None:
    levels, labels = image_files.images(20, (3, 4))
    labels = np.where(labels == 3, 4, labels)
    with pytest.raises(ValueError, match="found none of 3"):
        fit(
            lambda: [levels],
            torch.from_numpy(labels.astype(np.int64)),
            256,
            moments_of(lambda: [levels], 256, "-"),
        )


def mean_divergence(model: shared_basis.SharedBasisMixture, t: float, n: int = 64) -> float:
    """The mean of div v/d over n draws of p_t: far below 0 the field is stiff."""
    x = model.sample(n, generator=torch.Generator().manual_seed(0), t=t, dtype=torch.float64)
    with torch.no_grad():
        return float(model.divergence(x, x.new_full((n,), t)).mean()) / model.basis.shape[0]


def test_digits_are_fitted_alike_every_time_and_are_stiff() -> None:
    model, moments = image_mixture("digits-gmm")
    image_mixtures._mixture.cache_clear()
    again, _ = image_mixture("digits-gmm")
    assert torch.equal(model.spectra, again.spectra)
    assert model.event_shape == (1, 8, 8)
    assert float(model.spectra.min()) >= noise_variance(17)
    least, left = min(
        (mean_divergence(model, 1 - left), left) for left in np.geomspace(5e-4, 1.0, 20).tolist()
    )
    assert least < -2.5
    assert 0.02 < left < 0.1  # about the standard deviation of the noise, 0.034
    assert moments.mean.shape == (64,)


def test_a_fit_is_kept_and_a_damaged_one_made_again(files: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first, _ = image_mixture("fashion-mnist-gmm", say=said.append)
    assert any("sweep 12 of 12" in line for line in said)
    kept = sorted(path.parent.name for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert kept == ["mixtures", "moments"]
    quiet: list[str] = []
    second, _ = image_mixture("fashion-mnist-gmm", say=quiet.append)
    assert quiet == []
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        head = path.read_bytes()[:100]
        path.unlink()  # the old one is mapped
        path.write_bytes(head)
    third, _ = image_mixture("fashion-mnist-gmm", say=lambda line: said.append(line))
    x = first.sample(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for other in (second, third):
        assert other.log_prob(x).numpy() == pytest.approx(first.log_prob(x).numpy(), rel=1e-12)


# --- tasks --------------------------------------------------------------------------------------------------


def test_points_are_the_same_however_they_are_cut(files: Path) -> None:
    for name, split, draws in (
        ("fashion-mnist", "test", 3),
        ("digits-gmm", "test", 1),
        ("digits-gmm", "images", 2),
        ("fashion-mnist-gmm", "images", 2),
    ):
        task = get_task(name)
        items = task.items(split, 20, draws)
        x = whole(items.x)
        assert x.shape == (20 * draws, *task.event_shape)
        assert torch.equal(torch.cat(list(chunks(items.x, 7))), x)
        assert len(set(items.ids.tolist())) == 20 * draws
        if draws == 1:
            assert torch.equal(whole(task.items(split, 5).x), x[:5])


def test_an_evaluation_holds_a_batch_and_not_the_data_set() -> None:
    task = get_task("digits-gmm")
    model, _ = task.load_model("closed-form", "cpu")
    items, asked = task.items("test", 1000), []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return whole(items.x[start:stop])

    x = Points(rows, 1000, task.event_shape, torch.float32)
    cell = suites.expand(["digits-gmm"], None, [CLOSED], Options(batch_size=100))[0]
    out = evaluate(cell, model, x, items.ids)
    reference = task.reference("test", type(items)(x=x, ids=items.ids, n=1000), 1.0)
    assert max(asked) <= 256
    assert len(out.log_prob) == reference.log_prob.size == 1000


def test_the_closed_form_row_of_a_mixture_agrees_with_its_truth() -> None:
    spec = "ode[rtol=1e-6,atol=1e-6,trace=closed]"
    for split in ("test", "images"):
        cell = suites.expand(["digits-gmm"], None, [spec], Options(n_items=24, rounds=0), splits=[split])[0]
        row, arrays = run_cell(cell)
        assert row["status"] == "ok", row["reason"]
        assert row["bpd_mae"] < 1e-3
        assert 2.0 < row["bpd"] < 3.5  # of 17 levels, for draws as for images
        assert len(arrays["log_prob"]) == 24


def test_the_gaussian_control_runs_without_a_teacher_and_the_mean_says_why_not(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageTask, "has_model", lambda task, model: False)
    options = Options(n_items=15)
    gaussian, mean = suites.expand(["fashion-mnist"], None, ["control-gaussian", "control-mean"], options)
    row, _ = run_cell(gaussian)
    assert row["status"] == "ok", row["reason"]
    assert np.isfinite(row["bpd"])
    assert row["bpd_mae"] is None
    row, _ = run_cell(mean)
    assert (row["status"], row["reason"]) == (
        "skipped",
        "fashion-mnist has no teacher yet, so there is no reference likelihood: flowlik train fashion-mnist "
        "teacher, then flowlik reference fashion-mnist",
    )


@pytest.mark.parametrize(
    ("there", "judge"),
    [
        ((), "teacher"),
        (("teacher",), "teacher"),
        (("teacher-small",), "teacher-small"),
        (("teacher", "teacher-small"), "teacher"),
    ],
)
def test_the_smaller_teacher_is_the_reference_where_it_alone_is_there(
    there: tuple[str, ...], judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageTask, "has_model", lambda task, model: model in there)
    assert get_task("cifar10").reference_model == judge
    assert get_task("fashion-mnist").reference_model == "teacher"


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet64", "cifar10-gmm", "fashion-mnist-gmm"])
def test_missing_files_skip_a_cell_with_the_cure(nothing: None, name: str) -> None:
    task = get_task(name)
    there = [model for model in task.models if task.has_model(model)]
    specs = [CLOSED, "control-gaussian"] if there else ["control-gaussian"]
    for cell in suites.expand([name], there or None, specs, Options(n_items=5)):
        row, _ = run_cell(cell)
        assert row["status"] == "skipped"
        assert row["reason"].endswith(f"flowlik data get {name.removesuffix('-gmm')}")


def test_an_altered_file_is_an_error_that_names_it(files: Path) -> None:
    file = files / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1])
    (cell,) = suites.expand(["fashion-mnist"], None, ["control-gaussian"], Options(n_items=5))
    row, _ = run_cell(cell)
    assert row["status"] == "error"
    assert str(file) in row["reason"]
    assert "expected MD5" in row["reason"]


def test_a_folder_that_is_not_there_and_a_task_without_models_are_bad_usage(tmp_path: Path) -> None:
    call = CliRunner().invoke
    missing = call(app, ["run", "--data-dir", str(tmp_path / "none"), "--dry-run"])
    assert (missing.exit_code, "no such data folder" in missing.output) == (2, True)
    without = call(app, ["run", "-t", "mnist", "-e", CLOSED, "--dry-run"])
    assert (without.exit_code, "no model of mnist is there yet" in without.output) == (2, True)
    controls = call(app, ["run", "-t", "mnist", "-e", "control-gaussian", "--dry-run"])
    assert (controls.exit_code, "mnist · teacher · control-gaussian" in controls.output) == (0, True)


def test_estimators_of_images_fit_the_mixtures() -> None:
    task = get_task("digits-gmm")
    assert isinstance(task, ImageMixtureTask)
    model, _ = task.load_model("closed-form", "cpu")
    from flowlik_models.moments.moments import attach

    x = whole(task.items("test", 4).x).float()
    quadrature = {"trace": "hutchinson", "divergence": "quadrature", "nodes": 17}
    for options in (
        {"basis": "dct"},
        {"basis": "pca", "control": "gaussian"},
        {"basis": "auto", "control": "auto"},
    ):
        out = get("ode", rtol=1e-3, atol=1e-3, **quadrature, **options).log_prob(
            attach(model, task.data_moments()), x
        )
        assert out.status == "ok"
        assert out.stderr is not None
