"""Classifiers behind the Frechet distances of images."""

from __future__ import annotations

from pathlib import Path

import image_files
import pytest
import torch

from flowlik_models.checkpoints import read_checkpoint
from flowlik_models.features.classifier import EXTRACTORS, extractor_for, load_extractor
from flowlik_models.images import CATALOG
from flowlik_models.images.folders import DATA_VARIABLE
from flowlik_models.moments.training_images import training_images
from flowlik_models.training.feature_classifier import train_features


def test_a_classifier_comes_back_with_its_test_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setitem(CATALOG, "fashion-mnist", image_files.write_idx(tmp_path))
    training_images.cache_clear()
    path = train_features(tmp_path / "features.safetensors", "fashion-mnist", steps=2)
    card = read_checkpoint(path)[1]
    assert 0 <= card["accuracy"]["test"] <= 1
    assert card["data_hash"] == training_images("fashion-mnist").identity
    extractor = load_extractor("fashion-mnist", path=path)
    assert extractor is not None
    assert not extractor.training
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(extractor(x), load_extractor("fashion-mnist", path=path)(x))  # type: ignore[misc]


@pytest.mark.parametrize("task", EXTRACTORS)
def test_features_are_as_wide_as_their_name_says(task: str) -> None:
    network = extractor_for(task).eval()
    shape = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}[task]
    x = torch.zeros(2, *shape)
    assert network(x).shape == (2, network.num_features)
    assert network.logits(x).shape == (2, 10)
    assert network.name.endswith(f"-{network.num_features}")


def test_tasks_without_one_are_named() -> None:
    with pytest.raises(
        ValueError, match="'gmm-2d' has no feature classifier; valid: digits, fashion-mnist, cifar10"
    ):
        extractor_for("gmm-2d")
    assert load_extractor("gmm-2d") is None
