"""Tensors as the bytes of a safetensors file, without a copy.

`safetensors.torch.save` makes two copies of all tensors in memory, which at the end of a phase is what a run
of many parameters needs most memory for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_pieces(named: Mapping[str, Tensor]) -> list[memoryview]:
    """The file's bytes in order: length and text of the header, then views of the tensors.

    Wide types come first, so that each tensor is aligned to its own width.

    Args:
        named: contiguous tensors on the CPU.

    Raises:
        ValueError: a dtype that the format has no name for.
    """
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))
    header: dict[str, Any] = {}
    at = 0
    for name in order:
        tensor = named[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, _NAMES))}")
        place = [at, at + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        at = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    values = [named[name].reshape(-1).view(torch.uint8).numpy().data for name in order]
    return [memoryview(len(text).to_bytes(8, "little") + text), *values]
