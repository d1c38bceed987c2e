"""What makes training faster without changing what is trained: layout, fused kernels, compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowlik_models.networks.attention import fuse_attention
from flowlik_models.recipes.recipe import Recipe, needs_forward_mode


def laid_out(network: nn.Module, recipe: Recipe, device: str) -> nn.Module:
    """The network in the recipe's memory format; on a GPU with fused attention.

    Attention is written out where forward-mode derivatives are taken, which the fused one does not have.
    """
    if recipe.execution.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse_attention(network, torch.device(device).type == "cuda" and not needs_forward_mode(recipe))
    return network


def compiled(network: Any, recipe: Recipe) -> None:
    """Compile the backbones in place where the recipe says so; what surrounds it stays as written."""
    if recipe.execution.compile:
        parts = [getattr(network, name) for name in getattr(network, "networks", ())]
        for part in parts or [getattr(network, "backbone", network)]:
            part._hidden = torch.compile(part._hidden)


def optimiser(network: nn.Module, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    """Adam, with decoupled weight decay where there is one; one fused kernel a step on a GPU or where asked for."""
    kind = torch.optim.AdamW if recipe.optimiser.weight_decay else torch.optim.Adam
    fused = recipe.execution.fused or torch.device(device).type == "cuda"
    return kind(
        network.parameters(),
        lr=recipe.optimiser.learning_rate,
        weight_decay=recipe.optimiser.weight_decay,
        betas=recipe.optimiser.betas,
        fused=fused,
    )
