"""Bytes of a safetensors file: what the library reads back, and no copy of the tensors."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from distclust.training.tensor_bytes import safetensors_pieces

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def test_the_library_reads_what_was_written() -> None:
    named = {f"t{n}": (torch.arange(6).reshape(2, 3) - 2).to(dtype) for n, dtype in enumerate(DTYPES)}
    named |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), 'name \u2208 "x"': torch.ones(3)}
    found = safetensors.torch.load(b"".join(safetensors_pieces(named)))
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    assert safetensors.torch.load(b"".join(safetensors_pieces({}))) == {}


def test_each_tensor_is_aligned_to_its_own_width() -> None:
    named = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(3, dtype=torch.int16), "c": torch.ones(3)}
    length, header = safetensors_pieces(named)[0][:8], safetensors_pieces(named)[0][8:]
    assert int.from_bytes(length, "little") % 8 == 0
    for name, entry in json.loads(bytes(header)).items():
        assert entry["data_offsets"][0] % named[name].element_size() == 0


def test_tensors_are_not_copied() -> None:
    tensor = torch.zeros(1000)
    pieces = safetensors_pieces({"weights": tensor})
    tensor[999] = 1.0
    assert safetensors.torch.load(b"".join(pieces))["weights"][999] == 1.0


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        safetensors_pieces({"z": torch.zeros(2, dtype=torch.complex64)})
