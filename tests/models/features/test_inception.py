"""The standard Inception: its structure, what is odd about it, and the file that its weights come from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import image_files
import pytest
import torch
from typer.testing import CliRunner

from flowlik.cells import Cell, Options
from flowlik.cli import app
from flowlik.evaluation.prepare import prepare
from flowlik.evaluation.samples import real_features as kept
from flowlik.evaluation.samples.quality import judge
from flowlik.measures.bootstrap import resample_counts
from flowlik.measures.frechet import (
    RESAMPLES,
    Sums,
    _few,
    _many,
    expanded,
    features_of,
    frechet,
    frechet_distance,
    normal_of,
)
from flowlik.measures.precision_recall import kernel_distance, precision_recall
from flowlik.planning import suites
from flowlik.report import frame, numbers
from flowlik.report.tables.run import tables
from flowlik.running.run import run_cells
from flowlik.tasks.images import ImageTask
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import UnavailableError
from flowlik_estimators import get
from flowlik_models.checkpoints import CheckpointError
from flowlik_models.features import inception
from flowlik_models.features.inception import Inception, check_weights, enlarged, load_inception
from flowlik_models.images import CATALOG
from flowlik_models.images.folders import CACHE_VARIABLE, DATA_VARIABLE
from flowlik_models.images.image_set import evaluation_order


@pytest.fixture(scope="module")
def network() -> Inception:
    """Random weights under which the features of different images differ as much at the end as at the beginning."""
    torch.manual_seed(0)
    found = Inception().eval().requires_grad_(False)
    for module in found.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return found


@pytest.fixture(scope="module")
def weights(network: Inception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of that network, without the counters that not every conversion holds."""
    path = tmp_path_factory.mktemp("weights") / inception.FILE
    held = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(held, path)
    return path


def accept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this file for the published one."""
    monkeypatch.setattr(inception, "SHA256_BEGINS", hashlib.sha256(path.read_bytes()).hexdigest()[:8])


def generated(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- structure ----------------------------------------------------------------------------------------------


def test_the_network_has_the_parameters_of_the_published_one(network: Inception) -> None:
    # without scores 21,785,568 weights: those of Keras' Inception-v3 without its top, 21,768,352 that are trained,
    # and the 17,216 scales of its batch norms, which Keras leaves out; 1008 x 2049 for the scores
    assert sum(p.numel() for p in network.parameters()) == 21_768_352 + 17_216 + 1008 * 2049
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(name.endswith(".conv.weight") for name in shapes) == 94
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6a.branch3x3.conv.weight"] == (384, 288, 3, 3)
    assert shapes["Mixed_6c.branch7x7_2.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_6e.branch7x7dbl_5.bn.running_var"] == (192,)
    assert shapes["Mixed_7a.branch7x7x3_3.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7b.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)
    assert shapes["fc.weight"] == (1008, 2048)


def test_blocks_have_the_sizes_of_the_paper(network: Inception) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: tuple(out.shape[1:])})
        )
        for name in ("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6a", "Mixed_6e", "Mixed_7a", "Mixed_7c")
    ]
    features = network(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    assert seen == {
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6a": (768, 17, 17),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7a": (1280, 8, 8),
        "Mixed_7c": (2048, 8, 8),
    }
    assert features.shape == (1, 2048)


def test_averages_leave_out_the_padding_and_the_last_block_takes_maxima(network: Inception) -> None:
    ones = torch.ones(1, 1, 3, 3)
    assert torch.equal(inception.average(ones), ones)  # with the padding counted: 4/9 in the corners
    ramp = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert inception.average(ramp)[0, 0].tolist() == [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]
    assert inception.maximum(ramp)[0, 0].tolist() == [[4, 5, 5], [7, 8, 8], [7, 8, 8]]

    def pool(name: str) -> object:
        return network.get_submodule(name).paths[-1][0]

    blocks = ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"]
    assert {pool(name) for name in blocks} == {inception.average}
    assert pool("Mixed_7c") is inception.maximum


def test_the_resize_puts_output_pixel_i_at_i_n_over_side_of_the_input() -> None:
    row = torch.tensor([[0.0, 3.0]])
    x = row.expand(1, 1, 2, 2)
    # at 0, 2/3, 4/3: centres of pixels would give 0, 1.5, 3
    assert enlarged(x, 3)[0, 0, 0].tolist() == pytest.approx([0.0, 2.0, 3.0])
    assert enlarged(x, 4)[0, 0, :, 1].tolist() == pytest.approx([1.5] * 4)
    assert enlarged(x.transpose(2, 3), 3)[0, 0, :, 0].tolist() == pytest.approx([0.0, 2.0, 3.0])
    four = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert enlarged(four, 2)[0, 0].tolist() == [[0, 2], [8, 10]]  # every other pixel, no average
    assert torch.equal(enlarged(four, 4), four)


def test_the_network_sees_levels_about_128_in_three_channels(network: Inception) -> None:
    seen: list[torch.Tensor] = []
    hook = network.get_submodule("Conv2d_1a_3x3").register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    levels = torch.tensor([0, 128, 192, 255], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(-1, -1, 2, 2)
    network(levels)
    hook.remove()
    assert seen[0].shape == (4, 3, 299, 299)
    assert seen[0].amax((1, 2, 3)).tolist() == pytest.approx([-1.0, 0.0, 0.5, 127 / 128])
    assert seen[0].amin((1, 2, 3)).tolist() == pytest.approx([-1.0, 0.0, 0.5, 127 / 128])


def test_points_get_the_level_whose_cell_they_lie_in() -> None:
    levels = torch.arange(256, dtype=torch.float64)
    for noise in (0.001, 0.5, 0.999):
        z = (2 * (levels + noise) / 256 - 1).float()
        assert torch.equal(inception.quantised(z), levels.to(torch.uint8))
    assert inception.quantised(torch.tensor([-3.0, 1.0, 7.0])).tolist() == [0, 255, 255]


# --- the file -----------------------------------------------------------------------------------------------


def test_weights_come_back_and_a_batch_has_the_features_of_its_images(
    weights: Path, network: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(weights, monkeypatch)
    found = load_inception(weights)
    assert not found.training
    levels = torch.from_numpy(image_files.images(2, (3, 32, 32))[0])
    monkeypatch.setattr(Inception, "side", 75)
    monkeypatch.setattr(Inception, "at_once", 1)
    assert torch.allclose(features_of(found, levels), network(levels), atol=1e-6)
    assert load_inception(weights) is found


def test_another_file_is_named_with_both_checksums(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"begins with 6726825d, found [0-9a-f]{8} .*truncated, altered"
    ):
        load_inception(weights)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file; expected .*6726825d\.pth"):
        check_weights(tmp_path / "nowhere.pth")


def test_what_is_no_file_of_these_tensors_is_refused(
    network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.pth"
    state = {"fc.bias": network.fc.bias}
    for content, message in (
        (state, "expected a tensor 'Conv2d_1a_3x3.conv.weight'"),
        ([1, 2], "expected tensors by name"),
        ({"fc.bias": Path("x")}, "written by torch.save"),
    ):
        torch.save(content, path)
        accept(path, monkeypatch)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_inception(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    accept(path, monkeypatch)
    with pytest.raises(CheckpointError, match=r"written by torch\.save"):
        load_inception(path)


def test_a_run_with_other_weights_ends_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"half of it")
    result = CliRunner().invoke(app, ["run", "-t", "gaussian-2d", "--inception", str(file), "--dry-run"])
    assert result.exit_code == 2
    (line,) = result.output.strip().splitlines()
    assert "expected a SHA-256 that begins with 6726825d" in line


# --- distances of wide features -----------------------------------------------------------------------------


def test_the_distance_agrees_with_torchmetrics_whatever_the_number_of_samples() -> None:
    class Plain(torch.nn.Module):
        num_features = 12

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    real, samples = generated(300, 12), generated(200, 12, seed=1) @ generated(12, 12, seed=2) + 0.3
    for n in (8, 12, 200):  # fewer than features go through n x n matrices
        ours = expanded(normal_of(real), samples[:n])[0]
        theirs = frechet_distance(Plain(), real.reshape(-1, 1, 3, 4), samples[:n].reshape(-1, 1, 3, 4))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_moments_of_pieces_far_from_zero_are_those_of_the_whole() -> None:
    x = 1e4 + generated(500, 3)
    sums = Sums()
    for part in torch.split(x, 70):
        sums.add(part)
    assert torch.allclose(sums.normal().mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(sums.normal().covariance, torch.cov(x.T), atol=1e-9)


@pytest.mark.parametrize("n", [60, 10])
def test_a_sample_moves_the_distance_as_the_expansion_says(n: int) -> None:
    real, samples = normal_of(generated(400, 12)), 1.2 * generated(n, 12, seed=1) + 0.2
    counts = torch.full((n,), 1000)
    value, influence = expanded(real, samples.repeat_interleave(counts, 0))
    counts[0] += 2  # a little more weight
    heavier, _ = expanded(real, samples.repeat_interleave(counts, 0))
    share = 2 / float(counts.sum())
    assert heavier - value == pytest.approx(share * influence[0], rel=0.01)
    assert influence.mean() == pytest.approx(0.0, abs=1e-3 * influence.std())


def test_matrices_over_samples_and_over_features_say_the_same() -> None:
    real, samples = normal_of(generated(400, 12)), 1.2 * generated(9, 12, seed=1) + 0.2
    few, many = (way(real, normal_of(samples), samples) for way in (_few, _many))
    for a, b in zip(few, many, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_the_expansion_knows_the_scatter_of_fresh_samples() -> None:
    real = normal_of(generated(5000, 8).relu())
    drawn = [(1.2 * generated(300, 8, seed=10 + k)).relu() + 0.1 for k in range(80)]
    values = torch.tensor([expanded(real, samples)[0] for samples in drawn], dtype=torch.float64)
    found = frechet(real, drawn[0])
    assert found.frechet == float(values[0])
    assert found.frechet_se == pytest.approx(float(values.std()), rel=0.3)
    assert found.resampled.std(ddof=1) == pytest.approx(found.frechet_se, rel=0.2)
    counts = torch.from_numpy(resample_counts(300, RESAMPLES)).long()
    in_full = torch.tensor([expanded(real, drawn[0].repeat_interleave(c, 0))[0] for c in counts])
    both = torch.stack([torch.from_numpy(found.resampled), in_full.double()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, samples = generated(50, 4), generated(70, 4, seed=1) + 0.5
    whole = (*precision_recall(real, samples), kernel_distance(real, samples))
    monkeypatch.setattr("flowlik.measures.precision_recall._ROWS", 7)
    assert (*precision_recall(real, samples), kernel_distance(real, samples)) == pytest.approx(whole)


# --- a task judged by it ------------------------------------------------------------------------------------


@pytest.fixture
def fashion(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Fashion-MNIST, the network in small, and the cache folder."""
    for variable, folder in ((DATA_VARIABLE, "data"), (CACHE_VARIABLE, "cache")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setenv(inception.VARIABLE, str(weights))
    monkeypatch.setattr(image_files, "TRAIN", 16)
    monkeypatch.setitem(CATALOG, "fashion-mnist", image_files.write_idx(tmp_path / "data"))
    monkeypatch.setattr(Inception, "side", 75)
    accept(weights, monkeypatch)
    kept._known.cache_clear()
    return tmp_path / "cache"


def test_images_are_judged_by_it_in_eight_bits(fashion: Path, network: Inception) -> None:
    task = get_task("fashion-mnist")
    levels = torch.from_numpy(image_files.images(8, (1, 28, 28))[0])
    x = 2 * (levels + 0.7) / 256 - 1
    columns, extra = judge(task, x, None)
    assert (columns["extractor"], columns["n_samples"]) == ("inception-2015-12-05", 8)
    assert extra["real_images"] == image_files.TRAIN
    real = torch.from_numpy(image_files.images(image_files.TRAIN, (28, 28), seed=image_files.TRAIN)[0])[
        :, None
    ]
    theirs, ours = network(real), network(levels)
    assert columns["frechet"] == pytest.approx(expanded(normal_of(theirs), ours)[0], rel=1e-4)
    assert columns["kid"] == pytest.approx(kernel_distance(theirs, ours), rel=1e-3, abs=1e-9)
    assert (columns["precision"], columns["recall"]) == precision_recall(theirs, ours)
    assert columns["frechet_se"] > 0
    # a second time from memory, then from the file, bit for bit
    (file,) = (fashion / "features").glob("fashion-mnist-train-*-inception-2015-12-05-*.safetensors")
    written = file.stat().st_mtime_ns
    assert judge(task, x, None) == (columns, extra)
    kept._known.cache_clear()
    assert judge(task, x, None)[0] == columns
    assert file.stat().st_mtime_ns == written


class Still(torch.nn.Module):
    """A joint map that leaves the noise where it is."""

    event_shape = (1, 28, 28)

    def joint(
        self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, *, cond: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(x), torch.zeros_like(t)


def test_a_run_writes_an_fid_and_a_resumed_one_without_the_weights_is_another_cell(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: Any) -> Any:
        raise UnavailableError("these images have no reference")

    monkeypatch.setattr(ImageTask, "load_model", lambda self, model, device: (Still().eval(), "still"))
    monkeypatch.setattr(ImageTask, "reference", without)
    options = Options(n_items=4, samples=6, rounds=0)
    cell = Cell(task="fashion-mnist", model="teacher", estimator=get("f2d2", steps=1), options=options)

    def run() -> list[dict[str, Any] | None]:
        return [outcome.row for outcome in run_cells([cell], tmp_path / "run", resume=True)]

    (row,) = run()
    assert row is not None
    assert (row["status"], row["extractor"], row["n_samples"]) == ("ok", "inception-2015-12-05", 6)
    assert row["frechet"] > 0
    assert run() == [None]
    monkeypatch.setenv(inception.VARIABLE, str(tmp_path / "gone.pth"))
    (broken,) = [outcome.row for outcome in run_cells([cell], tmp_path / "other")]
    assert broken is not None
    assert broken["status"] == "error"
    assert "gone.pth: no such file" in broken["reason"]
    monkeypatch.delenv(inception.VARIABLE)
    (plain,) = run()
    assert plain is not None
    assert plain["extractor"] != "inception-2015-12-05"


def test_kept_features_that_were_altered_are_made_again(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "KEPT", 8)  # those kept are the first of the order of evaluation
    task = get_task("fashion-mnist")
    extractor = load_inception(Path(str(inception.named_weights())))
    found = kept.real_features(task, extractor, torch.device("cpu"))
    assert found is not None
    assert (found.count, len(found.features), len(found.radii)) == (image_files.TRAIN, 8, 8)
    first = task.images("train").pixels(evaluation_order(image_files.TRAIN)[:8])  # type: ignore[attr-defined]
    assert torch.allclose(found.features, extractor(first), atol=1e-6)
    (file,) = (fashion / "features").iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    identity = file.stem.removeprefix("fashion-mnist-train-")
    with pytest.raises(CheckpointError, match="altered since it was written"):
        kept.load(file, identity)
    kept._known.cache_clear()
    with pytest.warns(UserWarning, match="altered since it was written; made again"):
        again = kept.real_features(task, extractor, torch.device("cpu"))
    assert again is not None
    assert torch.equal(again.features, found.features)
    kept.load(file, identity)
    with pytest.raises(CheckpointError, match="expected features another, found those of"):
        kept.load(file, "another")


def test_without_the_weights_a_cell_is_what_it_was(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(likelihood=False, samples=4, n_items=4, rounds=0)
    images, digits = (
        Cell(task=task, model="closed-form", estimator=get("ode"), options=options)
        for task in ("fashion-mnist", "digits")
    )
    judged = [prepare(cell).cell_id for cell in (images, digits)]
    quiet = prepare(images.with_options(samples=0, likelihood=True)).cell_id
    monkeypatch.delenv(inception.VARIABLE)
    plain = [prepare(cell).cell_id for cell in (images, digits)]
    assert judged[0] != plain[0]
    assert judged[1] == plain[1]
    assert prepare(images.with_options(samples=0, likelihood=True)).cell_id == quiet
    columns, _ = judge(get_task("digits"), get_task("digits").items("test", 40).x, None)
    assert columns["extractor"] == "digits-cnn-64"
    columns, _ = judge(get_task("mnist"), torch.zeros(4, 1, 28, 28), None)
    assert columns == {"n_samples": 4}


# --- several seeds ------------------------------------------------------------------------------------------


def test_seeds_of_a_suite_give_samples_of_their_own_and_a_mean_with_its_spread(tmp_path: Path) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text(
        'controls = false\n[[cells]]\ntasks = ["digits"]\nmodels = ["meanflow-f2d2"]\n'
        'estimators = ["f2d2[steps=1]"]\nn_items = 8\nsamples = 40\nseeds = [0, 1, 2]\nrounds = 0\n'
    )
    outcomes = list(run_cells(suites.load_suite(str(suite)), tmp_path / "run"))
    values = [outcome.row["frechet"] for outcome in outcomes if outcome.row]
    assert len(set(values)) == 3
    mean, spread = (float(value) for value in (torch.tensor(values).mean(), torch.tensor(values).std()))
    for table in tables(frame.load(tmp_path / "run"))[:2]:
        texts = " | ".join(cell.text for row in table.rows for cell in row)
        assert f"{numbers.number(mean)} ± {numbers.number(spread, 2)}" in texts
        assert "Means over up to 3 seeds" in table.note
