r"""Mixtures fitted to real images: closed-form flows as stiff as images, with their exact likelihood.

A mixture has as many components as its images have classes. The components share the eigenvectors V of the images'
covariance; weights, means and variances along V are fitted by expectation maximisation (Dempster, Laird and Rubin 1977)
that starts from the classes. The uniform noise of the dequantisation enters exactly: its variance ``q = (2/L)^2/12`` is
the same in any direction, is part of every component's variances, none of which can be below it, and of the expected
square of a coordinate when responsibilities are taken. Nothing is random.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowlik_models.checkpoints import CheckpointError, read_checkpoint, save_tensors
from flowlik_models.closed_forms.shared_basis import SharedBasisMixture
from flowlik_models.files import no_room
from flowlik_models.images import cache_dir, digits, open_images
from flowlik_models.interfaces import Moments
from flowlik_models.moments.images import ROWS, Chunks, Say, Voice, as_rows, image_moments, noise_variance
from flowlik_models.numerics.standard_normal import LOG_2PI

IMAGES_OF = {"digits-gmm": "digits", "fashion-mnist-gmm": "fashion-mnist", "cifar10-gmm": "cifar10"}
"""The images behind each mixture."""

SWEEPS = 12
VERSION = 1  # of the fit; raised with every change of the method
_DIGITS = (1, 8, 8)


@dataclass(frozen=True)
class Components:
    """Weights (K,), means along the axes less the overall mean (K, d) and variances along them (K, d), float64."""

    weights: Tensor
    offsets: Tensor
    spectra: Tensor


def fit(
    chunks: Chunks,
    labels: Tensor,
    n_levels: int,
    moments: Moments,
    *,
    sweeps: int = SWEEPS,
    say: Say = lambda _: None,
) -> Components:
    """Fit a mixture with one component for each class, along the eigenvectors of ``moments``.

    Args:
        chunks: yields all images in order, arrays (n, ...) of levels 0..n_levels - 1.
        labels: (n,) int64 classes 0..K - 1, each with at least one image.
        n_levels: L; images are scaled to [-1, 1].
        moments: of these images.
        sweeps: of expectation maximisation.
        say: called with lines about the progress.

    Raises:
        ValueError: a class has no image.
    """
    mean, basis = (torch.from_numpy(part).float() for part in (moments.mean, moments.eigenvectors))
    say("their coordinates")
    y = torch.cat([(_centres(chunk, n_levels) - mean) @ basis for chunk in chunks()])
    noise = noise_variance(n_levels)
    found = _from_classes(y, labels, noise)
    for sweep in range(sweeps):
        say(f"expectation maximisation, sweep {sweep + 1} of {sweeps}")
        found = _sweep(y, found, noise)
    return found


def _centres(chunk: np.ndarray, n_levels: int) -> Tensor:
    """The middles of the levels in [-1, 1], (n, d) float32."""
    return 2 * (as_rows(chunk).float() + 0.5) / n_levels - 1


def _from_classes(y: Tensor, labels: Tensor, noise: float) -> Components:
    classes = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=classes)
    if not bool((counts > 0).all()):
        raise ValueError(
            f"expected images of each of {classes} classes, found none of {int(counts.argmin())}"
        )
    ones = torch.nn.functional.one_hot(labels, classes)
    return _components(
        [_sums(*part) for part in zip(torch.split(y, ROWS), torch.split(ones, ROWS), strict=True)], noise
    )


def _sweep(y: Tensor, now: Components, noise: float) -> Components:
    """One step of expectation maximisation in the common basis."""
    precision = 1 / now.spectra
    pulled = now.offsets * precision
    volume = now.spectra.log() + LOG_2PI + now.offsets * pulled + noise * precision
    constant = now.weights.log() - 0.5 * volume.sum(1)
    once, twice = pulled.float().T, 0.5 * precision.float().T
    sums = []
    for rows in torch.split(y, ROWS):
        log_joint = constant + (rows @ once - rows.square() @ twice).double()
        sums.append(_sums(rows, log_joint.softmax(1)))
    return _components(sums, noise)


def _sums(rows: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass (K,), first and second moments (K, d) of some rows, float64."""
    shares = r.float()
    return r.sum(0).double(), (shares.T @ rows).double(), (shares.T @ rows.square()).double()


def _components(sums: list[tuple[Tensor, Tensor, Tensor]], noise: float) -> Components:
    mass, first, second = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    offsets = first / mass[:, None]
    spectra = (second / mass[:, None] - offsets.square()).clamp(min=0) + noise
    return Components(mass / mass.sum(), offsets, spectra)


# --- the mixtures of the tasks ------------------------------------------------------------------------------
def image_mixture(task: str, *, say: Say = lambda _: None) -> tuple[SharedBasisMixture, Moments]:
    """The mixture of a task, and the moments of its training images in the same basis; ``data_hash`` names the fit.

    What is fitted to images in files is kept in the cache folder (`flowlik_models.images.cache_dir`).

    Raises:
        ValueError: no such mixture. MissingDataError, DataError: the images are not there, or not as published.
    """
    return _mixture(task, mixture_hash(task), Voice(say))


def mixture_hash(task: str) -> str:
    """Twelve hexadecimal digits that name the images and the fit.

    Raises:
        ValueError: no such mixture. MissingDataError, DataError: the images are not there, or not as published.
    """
    if task not in IMAGES_OF:
        raise ValueError(f"no mixture of images {task!r}; valid: {', '.join(IMAGES_OF)}")
    source = IMAGES_OF[task]
    identity = (
        digits.data_hash(source, "train") if source == "digits" else open_images(source, "train").identity
    )
    return hashlib.sha256(f"{task} {identity} {VERSION} {SWEEPS}".encode()).hexdigest()[:12]


@lru_cache(maxsize=2)
def _mixture(task: str, name: str, voice: Voice) -> tuple[SharedBasisMixture, Moments]:
    source = IMAGES_OF[task]
    if source == "digits":
        levels, labels = digits.digits("train")
        mean, covariance = digits.mean_and_covariance(levels, digits.DIGITS_LEVELS)
        values, vectors = torch.linalg.eigh(covariance)
        moments, shape = Moments(mean.numpy(), values.numpy(), vectors.numpy(), name), _DIGITS
        found = fit(lambda: [levels.numpy()], labels, digits.DIGITS_LEVELS, moments)
    else:
        shape = open_images(source, "train").event_shape
        kept = image_moments(source, say=lambda line: voice.say(f"{task}, once: {line}"))
        moments = Moments(kept.mean, kept.eigenvalues, kept.eigenvectors, name)
        found = _of_files(task, name, moments, voice.say)
    basis = torch.from_numpy(moments.eigenvectors)
    means = torch.from_numpy(moments.mean) + found.offsets @ basis.T
    return SharedBasisMixture(found.weights, means, found.spectra, basis, shape), moments


def _of_files(task: str, name: str, moments: Moments, say: Say) -> Components:
    file = cache_dir() / "mixtures" / f"{task}-{name}.safetensors"
    if (kept := _kept(file)) is not None:
        return kept
    images = open_images(IMAGES_OF[task], "train")
    found = fit(
        lambda: images.chunks(ROWS),
        images.labels,
        images.data_set.levels,
        moments,
        say=lambda line: say(f"{task}, once: {line}"),
    )
    try:
        save_tensors(file, vars(found))
    except OSError as error:
        warnings.warn(f"the mixture of {task} is not kept: {no_room(file, error)}", stacklevel=2)
    return found


def _kept(file: Path) -> Components | None:
    """The fit of an earlier call; None where there is none or it is damaged, and it is made again."""
    if not file.is_file():
        return None
    try:
        return Components(**read_checkpoint(file)[0])
    except (CheckpointError, TypeError):
        return None
