"""Training of images from files: one trajectory however a step is shared out, and loss that falls."""

from __future__ import annotations

import functools
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import image_files
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from flowlik.cli import app
from flowlik_estimators import get
from flowlik_models.checkpoints import read_checkpoint
from flowlik_models.images import CATALOG, MissingDataError
from flowlik_models.images.folders import CACHE_VARIABLE, DATA_VARIABLE
from flowlik_models.moments import training_images as image_sets
from flowlik_models.moments.training_images import TrainingImages, training_images
from flowlik_models.networks.images import cosine_basis, cosine_moments
from flowlik_models.objectives import flow_matching_loss
from flowlik_models.objectives.calibration import calibration_loss, few_step_log_prob
from flowlik_models.objectives.realuid import RealUID
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training import preparation, process_group, trainer, trajectories
from flowlik_models.training.image_batches import ImageSource
from flowlik_models.training.losses import loss_of
from flowlik_models.training.process_group import Part
from flowlik_models.training.throughput import operations
from flowlik_models.training.trainer import Progress, train
from flowlik_models.zoo import build, load_model

TINY: dict[str, Any] = {"widths": (4, 8), "blocks": 1, "attention": (14,), "embed": 8, "dropout": 0.0}
STEPS, BATCH = 3, 8


def shrunk(monkeypatch: pytest.MonkeyPatch, task: str = "fashion-mnist") -> None:
    """The task's recipes at a size for tests."""
    for model, recipe in RECIPES[task].items():
        network = {**recipe.network, **TINY}
        pool = min(recipe.trajectories.pool, 4)
        small = recipe.with_options(network=network, batch=BATCH, pool=pool, pool_probes=1, compile=False)
        monkeypatch.setitem(RECIPES[task], model, small)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Fashion-MNIST and tiny recipes; where models go."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOG, "fashion-mnist", image_files.write_idx(tmp_path / "data"))
    training_images.cache_clear()
    shrunk(monkeypatch)
    monkeypatch.setattr(preparation, "solve", functools.partial(trajectories.solve, steps=8))
    return tmp_path / "train"


def weights(path: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in read_checkpoint(path)[0].items()}


@contextmanager
def stopped_at_the_third_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training inside saves after every step and is interrupted after three."""
    taken = trainer._Training.take

    def interrupted(self: trainer._Training, loss: Tensor, parts: int) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        taken(self, loss, parts)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_SAVE_EVERY", 0.0)
        patch.setattr(trainer._Training, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def assert_near(path: Path, other: Path, tolerance: float = 0.0) -> None:
    expected, found = weights(path), weights(other)
    assert list(expected) == list(found)
    worst = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert worst <= tolerance


def test_models_build_on_each_other_and_are_kept_in_half_precision(fashion: Path) -> None:
    made = {model: train("fashion-mnist", model, out=fashion, steps=1) for model in RECIPES["fashion-mnist"]}
    path = made["direct-f2d2"]
    tensors, card = read_checkpoint(path)
    assert tensors["stem.weight"].dtype == torch.float16
    assert tensors["eigenvalues"].dtype == torch.float32
    assert card["data_hash"] == training_images("fashion-mnist").identity
    network = load_model("fashion-mnist", "direct-f2d2", path=path)
    # what is loaded is what was judged, and its Gaussian part is that of the data
    assert torch.equal(network.eigenvalues, tensors["eigenvalues"])
    basis = network.eigenvectors
    torch.testing.assert_close(basis.T @ basis, torch.eye(784), atol=2e-3, rtol=0)  # type: ignore[operator]


def test_calibration_trains_the_divergence_head_alone_towards_known_likelihoods(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("teacher", "direct-f2d2"):
        before = train("fashion-mnist", model, out=fashion, steps=1)
    task, model = "fashion-mnist", "direct-f2d2-calibrated"
    fast = RECIPES[task][model].with_options(learning_rate=0.2)  # the first steps are a warm-up
    monkeypatch.setitem(RECIPES[task], model, fast)
    source = preparation.source_for(task, RECIPES[task][model], fashion, "cpu")
    assert source.pool is not None
    x, log_prob = source.pool.likelihoods(32, torch.Generator().manual_seed(1))

    def error(path: Path, model: str) -> float:
        network = load_model(task, model, path=path)
        found = [get("f2d2", steps=steps).log_prob(network, x).log_prob for steps in (1, 2, 4, 8)]
        return float(sum((each - log_prob).square().mean() for each in found)) ** 0.5

    after = train(task, model, out=fashion, steps=12)
    changed = {
        name for name, tensor in weights(before).items() if not torch.equal(tensor, weights(after)[name])
    }
    assert changed == {
        f"{layer}.{kind}" for layer in ("local", "pooled", "read_out") for kind in ("weight", "bias")
    }
    assert error(after, model) < 0.5 * error(before, "direct-f2d2")

    kept = weights(train(task, model, out=fashion, steps=5))
    with stopped_at_the_third_step(monkeypatch):
        train(task, model, out=fashion, steps=5)
    gone_on = weights(train(task, model, out=fashion, steps=5))
    assert all(torch.equal(kept[name], gone_on[name]) for name in kept)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_calibrated_likelihood_is_that_of_f2d2(fashion: Path, steps: int) -> None:
    train("fashion-mnist", "teacher", out=fashion, steps=1)
    network = load_model(
        "fashion-mnist", "direct-f2d2", path=train("fashion-mnist", "direct-f2d2", out=fashion, steps=2)
    )
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    expected = get("f2d2", steps=steps).log_prob(network, x).log_prob
    torch.testing.assert_close(few_step_log_prob(network, x, steps, 1.0), expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"expected log-densities of shape \(3,\)"):
        calibration_loss(network, x, torch.zeros(3, 1), 1.0)


def test_parts_of_a_batch_make_the_same_step(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of every step, by an optimiser that is smooth in them: Adam's first steps are their signs, so that the
    rounding of a gradient near zero moves a weight by the whole learning rate."""
    gradients: list[Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def noted(parameters: list[Tensor], *bound: float) -> Tensor:
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).double())  # type: ignore[union-attr]
        return clip(parameters, *bound)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    monkeypatch.setattr(trainer, "_WARM_UP", 1)
    monkeypatch.setattr(
        trainer.acceleration, "optimiser", lambda network, *_: torch.optim.SGD(network.parameters())
    )
    full = RECIPES["fashion-mnist"]["teacher"].with_options(
        precision="float32"
    )  # bfloat16 keeps 8 bits of a term
    monkeypatch.setitem(RECIPES["fashion-mnist"], "teacher", full)
    train("fashion-mnist", "teacher", out=fashion / "once", steps=STEPS)
    train("fashion-mnist", "teacher", out=fashion / "parts", steps=STEPS, accumulate=4)
    assert len(gradients) == 2 * STEPS
    assert not torch.equal(gradients[0], gradients[1])  # the steps do move the weights
    # a sum over the pixels of a batch in another order: half a unit in the last place a term at most
    tolerance = BATCH * 28 * 28 * torch.finfo(torch.float32).eps / 2
    for at_once, in_parts in zip(gradients[:STEPS], gradients[STEPS:], strict=True):
        assert (at_once - in_parts).norm() <= tolerance * at_once.norm()
    with pytest.raises(ValueError, match="a batch of 8 cannot be taken in 3 equal parts"):
        train("fashion-mnist", "teacher", out=fashion, steps=1, accumulate=3)


def test_parts_of_a_taught_batch_are_its_rows(fashion: Path) -> None:
    train("fashion-mnist", "teacher", out=fashion, steps=1)
    recipe = RECIPES["fashion-mnist"]["direct-f2d2"]
    source = preparation.source_for("fashion-mnist", recipe, fashion, "cpu")
    for model in ("meanflow-f2d2", "direct-f2d2"):
        recipe = RECIPES["fashion-mnist"][model]
        whole, *parts = (
            source.batch(recipe, torch.Generator().manual_seed(5), part)
            for part in (Part(), Part(0, 2), Part(1, 2))
        )
        for name in ("x", "t", "s", "velocity", "divergence", "direct"):
            together = torch.empty_like(getattr(whole, name))
            for index, part in enumerate(parts):
                together[index::2] = getattr(part, name)
            torch.testing.assert_close(together, getattr(whole, name), atol=1e-4, rtol=1e-4)


def test_interrupted_training_goes_on_to_the_same_weights(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("fashion-mnist", "teacher", out=fashion / "whole", steps=6, accumulate=2)
    with stopped_at_the_third_step(monkeypatch):
        train("fashion-mnist", "teacher", out=fashion / "cut", steps=6, accumulate=2)
    assert_near(whole, train("fashion-mnist", "teacher", out=fashion / "cut", steps=6, accumulate=2))


SCRIPT = """
import sys
from pathlib import Path
import pytest, image_files, test_image_training as here
from flowlik_models.training import train
data, out = map(Path, sys.argv[1:])
patch = pytest.MonkeyPatch()
patch.setitem(here.CATALOG, "fashion-mnist", image_files.tiny("fashion-mnist", dict.fromkeys(data.rglob("*.gz"))))
here.shrunk(patch)
train("fashion-mnist", "teacher", out=out, steps=here.STEPS)
"""


def test_two_processes_train_as_one(fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = train("fashion-mnist", "teacher", out=fashion / "alone", steps=STEPS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data"), str(fashion / "two")]
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(process_group, "_PATIENCE", timedelta(minutes=2))
    modules = os.pathsep.join(filter(None, (str(here.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
    with subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.PIPE) as other:
        together = train("fashion-mnist", "teacher", out=fashion / "two", steps=STEPS)
        _, error = other.communicate(timeout=120)
    assert other.returncode == 0, error.decode()[-2000:]
    assert_near(alone, together, 1e-3)  # half precision
    assert read_checkpoint(together)[1]["processes"] == 2


def test_progress_tells_images_and_operations_a_second(fashion: Path) -> None:
    seen: list[Progress] = []
    train("fashion-mnist", "teacher", out=fashion, steps=2, progress=seen.append)
    last = seen[-1]
    assert last.rate is not None
    assert last.flops is not None
    # forward and backward of every layer: three products, save for what lies before the first weights
    network = build("fashion-mnist", RECIPES["fashion-mnist"]["teacher"])
    x, t = torch.randn(1, 1, 28, 28), torch.rand(1)
    forward_and_backward = operations(lambda: network.velocity(x, t).square().mean())  # type: ignore[operator]
    assert last.flops / last.rate == pytest.approx(forward_and_backward, rel=0.02)
    assert last.utilisation is None  # of a CPU no peak is stated


def test_a_one_step_generator_of_images_from_files(fashion: Path) -> None:
    train("fashion-mnist", "teacher", out=fashion, steps=1)
    recipe = RECIPES["fashion-mnist"]["teacher"].with_options(
        objective="realuid",
        path="flow-matching",
        teacher="teacher",
        start_from="teacher",
        realuid=RealUID(a=0.9, fake_steps=1),
        steps=8,
    )
    network, source = preparation.prepared("fashion-mnist", recipe, fashion, "cpu")
    for step, part in ((0, network.fake), (1, network.generator)):
        network.zero_grad(set_to_none=True)
        loss = loss_of(recipe, network, network, source, torch.Generator().manual_seed(0), "cpu", step)
        torch.autograd.backward(loss)
        assert part.head.weight.grad.abs().max() > 0
    blank = build("fashion-mnist", recipe)  # as a checkpoint finds it: no image is looked at
    assert not torch.equal(blank.spread, network.spread)
    blank.load_state_dict(network.state_dict())
    z = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(blank.generate(z), network.generate(z))


def test_snapshots_keep_the_average_along_the_way(fashion: Path) -> None:
    path = train("fashion-mnist", "teacher", out=fashion, steps=16)
    kept = sorted((path.parent / "snapshots").iterdir())
    assert [file.name for file in kept] == [f"teacher-{step}.safetensors" for step in (1, 12, 2, 4, 8)]
    assert load_model("fashion-mnist", "teacher", path=kept[0]) is not None


def test_missing_images_end_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    training_images.cache_clear()
    with pytest.raises(MissingDataError, match="flowlik data get fashion-mnist"):
        train("fashion-mnist", "teacher", out=tmp_path, steps=1)


def test_the_command_trains_and_judges(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlik.training.card.JUDGED_IMAGES", 2)
    monkeypatch.setattr("flowlik.training.card.JUDGED_STEPS", 3)
    command = [
        "train",
        "fashion-mnist",
        "teacher",
        "--steps",
        "2",
        "--accumulate",
        "2",
        "--out",
        str(fashion),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "images/s" in result.output
    assert "FLOP/s" in result.output
    path = fashion / "fashion-mnist" / "teacher.safetensors"
    assert f"checkpoint: {path}" in result.output.replace("\n", "")
    (judged,) = read_checkpoint(path)[1]["accuracy"]["test"].values()
    assert math.isfinite(judged["bpd"])


# --- colour images ------------------------------------------------------------------------------------------


def test_variances_along_cosines_are_those_of_the_covariance() -> None:
    shape = (3, 2, 4)
    draws = torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = draws @ draws.T
    _, values, basis = cosine_moments(shape, (torch.zeros(24), *torch.linalg.eigh(covariance)))
    torch.testing.assert_close(values, (basis.T @ covariance @ basis).diagonal())
    torch.testing.assert_close(basis.T @ basis, torch.eye(24, dtype=torch.float64))
    grey = cosine_basis((3, 1, 1))[:, 0]
    torch.testing.assert_close(grey, torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64))


def test_mirrored_images_come_as_often_as_the_others() -> None:
    levels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    levels[..., 0] = 255
    recipe = RECIPES["fashion-mnist"]["teacher"].with_options(batch=400)
    for flips, share in ((True, 0.5), (False, 1.0)):
        source = ImageSource(TrainingImages(levels, 256, flips, "-"))
        data = source.data(400, recipe, torch.Generator().manual_seed(0))
        bright_left = (data[..., 0] > data[..., 3]).all(2).all(1).float().mean()
        assert float(bright_left) == pytest.approx(share, abs=0.1)
        assert float(data.min()) >= -1
        assert float(data.max()) <= 1


def test_small_models_of_colour_images_take_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "cifar10", image_files.write_cifar(tmp_path))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    training_images.cache_clear()
    flat = (torch.zeros(3072), torch.full((3072,), 0.2), torch.eye(3072))
    monkeypatch.setattr(image_sets, "training_moments", lambda task: flat)
    monkeypatch.setitem(TINY, "attention", (16,))
    shrunk(monkeypatch, "cifar10")
    # those whose like Fashion-MNIST has not; the others are its own in other widths
    for model in ("teacher-small", "shortcut-distill-f2d2-small", "pi-flow-4-small"):
        tensors, card = read_checkpoint(train("cifar10", model, out=tmp_path / "train", steps=1))
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values()), model
        assert card["recipe"]["teacher"] == ("data" if model == "teacher-small" else "teacher-small")


def test_a_network_with_classes_is_given_the_labels_of_its_images_but_a_tenth() -> None:
    levels = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 8, 8)
    source = ImageSource(TrainingImages(levels, 10, False, "-", torch.arange(10).flip(0)))
    recipes = [RECIPES["digits"][model].with_options(batch=4000) for model in ("teacher", "teacher-classes")]
    plain, labelled = (source.batch(each, torch.Generator().manual_seed(0)) for each in recipes)
    assert plain.cond is None
    assert labelled.cond is not None
    assert torch.equal(plain.x, labelled.x)  # labels are drawn last
    given = labelled.cond < 10
    assert float(given.float().mean()) == pytest.approx(0.9, abs=0.02)
    time = labelled.t.view(-1, 1, 1, 1)
    shown = (labelled.x + (1 - time) * labelled.velocity).amax((1, 2, 3))  # x + (1 - t)(x_1 - x_0) = x_1
    digit = ((shown + 1) * 5).floor().clamp(0, 9)
    assert torch.equal(9 - digit[given].long(), labelled.cond[given])
    halves = [source.batch(recipes[1], torch.Generator().manual_seed(0), Part(i, 2)) for i in range(2)]
    assert sorted(torch.cat([half.cond for half in halves if half.cond is not None]).tolist()) == sorted(
        labelled.cond.tolist()
    )


def test_the_loss_of_colour_images_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setitem(CATALOG, "cifar10", image_files.write_cifar(tmp_path))
    training_images.cache_clear()
    # the eigenvectors of 3072 dimensions are not what is tested
    flat = (torch.zeros(3072), torch.full((3072,), 0.2), torch.eye(3072))
    monkeypatch.setattr(image_sets, "training_moments", lambda task: flat)
    monkeypatch.setattr(trainer, "_WARM_UP", 5)
    shrunk(monkeypatch, "cifar10")
    recipe = RECIPES["cifar10"]["teacher"]
    network = {**recipe.network, "widths": (4, 8), "attention": (16,), "head": 8}
    recipe = recipe.with_options(network=network, learning_rate=2e-2)
    monkeypatch.setitem(RECIPES["cifar10"], "teacher", recipe)
    path = train("cifar10", "teacher", out=tmp_path / "train", steps=18)
    source = ImageSource(training_images("cifar10"))
    batch = source.batch(recipe.with_options(batch=32), torch.Generator().manual_seed(9))
    before, after = (
        float(flow_matching_loss(network, batch)["velocity"].mean().detach())
        for network in (
            build("cifar10", recipe, flat),
            load_model("cifar10", "teacher", path=path),
        )
    )
    assert after < 0.9 * before
    assert "eigenvectors" not in read_checkpoint(path)[0]
