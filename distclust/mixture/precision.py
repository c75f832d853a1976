"""The type of a training step's inner matrix products: float32, or bfloat16 as torch.autocast has it.

In bfloat16 are the products that lead to a hidden layer, of networks, gates and experts, and convolutions.
All else stays in float32: sparse rows, codes and logits, normalisation, energies, terms, what a
reconstruction is compared with (so the Gram form), statistics over the data, k-means, prediction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

Precision = Literal["auto", "float32", "bfloat16"]


class MixedProducts(nn.Module):
    """A module that says which of its products may be in bfloat16, by making them within `mixed`."""

    product_type: torch.dtype | None = None

    def mixed(self) -> AbstractContextManager[object]:
        """Products in the type that `products_in` set; without one, as they are."""
        if self.product_type is None:
            return nullcontext()
        return torch.autocast(next(self.parameters()).device.type, dtype=self.product_type)


def product_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type for `products_in`: None is float32; `auto` is bfloat16 on a GPU that computes in it."""
    if precision == "bfloat16":
        return torch.bfloat16
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "auto" and has_it else None


def mixed_parts(model: nn.Module) -> list[MixedProducts]:
    """The parts of a model for `products_in`: found once, and not in each step."""
    return [module for module in model.modules() if isinstance(module, MixedProducts)]


@contextlib.contextmanager
def products_in(parts: Sequence[MixedProducts], kind: torch.dtype | None) -> Iterator[None]:
    """Within it, the parts' `mixed` products are of this type; gradients follow them out of it."""
    for part in parts:
        part.product_type = kind
    try:
        yield
    finally:
        for part in parts:
            part.product_type = None
