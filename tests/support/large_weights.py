"""Weights under which errors show: transformers' own start is so flat that no test would see one."""

import torch
from torch import nn

__all__ = ["draw_large_weights"]


def draw_large_weights(
    model: nn.Module, generator: torch.Generator | None = None, *, with_vectors: bool = False
) -> None:
    """Draw all matrices, so that experts differ; with_vectors: and those vectors that are all zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            elif with_vectors and parameter.abs().max() == 0:
                parameter.normal_(std=0.1, generator=generator)
