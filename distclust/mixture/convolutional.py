"""Convolutional networks for rows that are images: an autoencoder, a gate, and augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.layers import ACTIVATIONS, LaneBatchNorm, Lanes, RowsLinear, uniform
from distclust.mixture.noise import Noise
from distclust.mixture.precision import MixedProducts
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import Rows, SparseRows

ConvLayers = Sequence[tuple[int, int, int, int]]


def as_images(x: Rows, image: tuple[int, ...]) -> Tensor:
    """Rows (B, D) as (B, C, H, W), channels first."""
    rows = x.to_dense() if isinstance(x, SparseRows) else x
    return rows.view(-1, *image)


@dataclass(frozen=True, slots=True)
class _Shape:
    """One convolution, with the sizes on both sides."""

    channels_in: int
    channels_out: int
    before: tuple[int, int]
    """(H, W) of its input."""
    after: tuple[int, int]
    """(H, W) of the convolution's output, before pooling."""
    pooled: tuple[int, int]
    """(H, W) after pooling."""
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    pooling: int

    @property
    def output_padding(self) -> tuple[int, int]:
        """What a transposed convolution adds to come back to `before`."""
        pairs = zip(self.before, self.after, self.kernel, self.padding, strict=True)
        return tuple(b - ((a - 1) * self.stride - 2 * p + k) for b, a, k, p in pairs)  # type: ignore[return-value]


def _shapes(image: tuple[int, ...], conv: ConvLayers, padding: str) -> list[_Shape]:
    """Every layer's sizes; kernels and poolings are cut to the map they meet."""
    channels, size = image[0], (image[1], image[2])
    shapes = []
    for out, kernel, stride, pooling in conv:
        kernels = (min(kernel, size[0]), min(kernel, size[1]))
        pads = tuple(k // 2 if padding == "same" else 0 for k in kernels)
        after = tuple((n + 2 * p - k) // stride + 1 for n, k, p in zip(size, kernels, pads, strict=True))
        pool = min(pooling, *after)
        pooled = tuple(n // pool for n in after)
        shapes.append(
            _Shape(channels, out, size, after, pooled, kernels, stride, pads, pool)  # type: ignore[arg-type]
        )
        channels, size = out, pooled  # type: ignore[assignment]
    return shapes


def _norm(kind: str, channels: int, lanes: Lanes | None) -> nn.Module:
    if kind == "batch":
        assert lanes is not None
        return LaneBatchNorm(channels, lanes)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


class ConvolutionalEncoder(MixedProducts):
    """Convolutions and poolings over (C, H, W), then one linear layer; a kernel that spans its map is one.

    A fully convolutional encoder whose last convolution covers the whole map (Aljalbout et al.) is this.
    """

    def __init__(self, s: ModelSettings, conv: ConvLayers, n_out: int, lanes: Lanes | None = None):
        super().__init__()
        self.shapes = _shapes(s.image, conv, s.conv_padding)
        self._image = s.image
        self.weights = nn.ParameterList(
            uniform((h.channels_out, h.channels_in, *h.kernel), h.channels_in * math.prod(h.kernel))
            for h in self.shapes
        )
        self.biases = nn.ParameterList(
            uniform((h.channels_out,), h.channels_in * math.prod(h.kernel)) for h in self.shapes
        )
        norm = s.norm if lanes is not None or s.norm != "batch" else "layer"
        self.norms = nn.ModuleList(_norm(norm, h.channels_out, lanes) for h in self.shapes)
        last = self.shapes[-1]
        self.n_flat = last.channels_out * math.prod(last.pooled)
        self.linear = RowsLinear(self.n_flat, n_out)
        self._activation = ACTIVATIONS[s.activation]

    def forward(
        self, x: Rows, noise: Noise | None, name: str, dropout: tuple[float, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, n_out), the feature maps `layer0`, ... and the poolings' switches `switch0`, ..."""
        if noise is not None:
            x = noise.dropout(f"{name}.input", x, dropout[0])
        h, layers = as_images(x, self._image), {}
        for i, shape in enumerate(self.shapes):
            with self.mixed():
                h = F.conv2d(h, self.weights[i], self.biases[i], stride=shape.stride, padding=shape.padding)
            h = self._activation(self.norms[i](h.to(self.weights[i].dtype)))
            if shape.pooling > 1:
                h, layers[f"switch{i}"] = F.max_pool2d(h, shape.pooling, return_indices=True)
            if noise is not None and dropout[1]:
                flat = noise.dropout(f"{name}.hidden{i}", h.flatten(1), dropout[1])
                assert isinstance(flat, Tensor)
                h = flat.view_as(h)
            layers[f"layer{i}"] = h
        return self.linear(h.flatten(1)), layers


class ConvolutionalAutoencoder(MixedProducts):
    """A convolutional encoder and its mirror: transposed convolutions, unpooling by the encoder's switches.

    Where the switches are not known (a decoder that starts from a centroid) a value goes to the first place
    of its pool. `parts` are the names that `networks.Autoencoder` has for the parts of a decoder, and what
    they are called here: phases train either by the former.
    """

    def __init__(
        self,
        s: ModelSettings,
        lanes: Lanes | None = None,
        conv: ConvLayers | None = None,
        code_size: int | None = None,
    ):
        super().__init__()
        self.code_size = code_size or s.code_size
        self.encoder = ConvolutionalEncoder(s, conv or s.conv, self.code_size, lanes)
        shapes = self.encoder.shapes
        self.expand = RowsLinear(self.code_size, self.encoder.n_flat)
        self.weights = nn.ParameterList(
            uniform((h.channels_out, h.channels_in, *h.kernel), h.channels_out * math.prod(h.kernel))
            for h in reversed(shapes)
        )
        self.biases = nn.ParameterList(
            uniform((h.channels_in,), h.channels_out * math.prod(h.kernel)) for h in reversed(shapes)
        )
        norm = s.norm if lanes is not None or s.norm != "batch" else "layer"
        # every layer but the output
        self.norms = nn.ModuleList(_norm(norm, h.channels_out, lanes) for h in reversed(shapes))
        self._activation = ACTIVATIONS[s.activation]
        self._dropout = (s.input_dropout, s.hidden_dropout)
        self._sigmoid = s.output == "sigmoid"
        last = len(shapes) - 1
        self.parts: dict[str, tuple[str, ...]] = {
            "decoder": ("expand", "weights", "biases", "norms"),
            "out_weight": (f"weights.{last}",),
            "out_bias": (f"biases.{last}",),
        }

    def encode(self, x: Rows, noise: Noise | None = None) -> Tensor:
        """Codes (B, J)."""
        return self.encode_with_layers(x, noise)[0]

    def encode_with_layers(self, x: Rows, noise: Noise | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes (B, J), feature maps and switches."""
        z, layers = self.encoder(x, noise, "network", self._dropout)
        return z, layers

    def recon_error(self, codes: Tensor, x: Rows, layers: dict[str, Tensor] | None = None) -> Tensor:
        """Squared error, or cross-entropy, of x summed over pixels, (B,)."""
        rows = x.to_dense() if isinstance(x, SparseRows) else x
        y = self._maps(codes, layers)[-1].flatten(1)  # (B, D)
        if self._sigmoid:
            return F.binary_cross_entropy_with_logits(y, rows, reduction="none").sum(1)
        return (rows - y).square().sum(1)

    def layer_errors(self, codes: Tensor, layers: dict[str, Tensor]) -> Tensor:
        """Mean squared error (B,) of each feature map against the decoder's mirror of it, added up."""
        maps = self._maps(codes, layers)[:-1]
        total = codes.new_zeros(codes.shape[0])
        for i, back in enumerate(reversed(maps)):
            total = total + (layers[f"layer{i}"].detach() - back).square().flatten(1).mean(1)
        return total

    def decode(self, codes: Tensor) -> Tensor:
        """The reconstruction (B, D); for pictures, never for a loss."""
        y = self._maps(codes, None)[-1].flatten(1)
        return y.sigmoid() if self._sigmoid else y

    def _maps(self, codes: Tensor, layers: dict[str, Tensor] | None) -> list[Tensor]:
        """The decoder's maps: mirrors of the encoder's, the last feature map first, then the output."""
        shapes = self.encoder.shapes
        last = shapes[-1]
        h = self.expand(codes).view(-1, last.channels_out, *last.pooled)
        h = self._activation(self.norms[0](h))
        found = [h]
        for i, shape in enumerate(reversed(shapes)):
            if shape.pooling > 1:
                switches = (layers or {}).get(f"switch{len(shapes) - 1 - i}")
                h = _unpool(h, shape, switches)
            hidden = i + 1 < len(shapes)
            with self.mixed() if hidden else nullcontext():
                h = F.conv_transpose2d(
                    h,
                    self.weights[i],
                    self.biases[i],
                    stride=shape.stride,
                    padding=shape.padding,
                    output_padding=shape.output_padding,
                )
            if hidden:
                h = self._activation(self.norms[i + 1](h.to(self.weights[i].dtype)))
            found.append(h)
        return found


def _unpool(h: Tensor, shape: _Shape, switches: Tensor | None) -> Tensor:
    """The reverse of a pooling: (B, C, *pooled) to (B, C, *after)."""
    if switches is None:
        rows = torch.arange(shape.pooled[0], device=h.device) * shape.pooling * shape.after[1]
        columns = torch.arange(shape.pooled[1], device=h.device) * shape.pooling
        switches = (rows[:, None] + columns).expand_as(h)
    return F.max_unpool2d(h, switches, [shape.pooling, shape.pooling], output_size=list(shape.after))


class ConvolutionalClassifier(nn.Module):
    """Images to K logits: convolutions, then hidden layers (a gate for images)."""

    def __init__(self, s: ModelSettings, n_clusters: int):
        super().__init__()
        widths = [*s.gate_hidden, n_clusters]
        self.features = ConvolutionalEncoder(s, s.gate_conv, widths[0])
        self.layers = nn.ModuleList(RowsLinear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self._activation = ACTIVATIONS[s.activation]
        self._dropout = (s.gate_dropout, s.gate_dropout)

    def forward(self, x: Rows, noise: Noise | None, name: str) -> Tensor:
        """Logits (B, K)."""
        h, _ = self.features(x, noise, name, self._dropout)
        for layer in self.layers:
            h = layer(self._activation(h))
        return h


def augment(x: Rows, image: tuple[int, ...], rotation: float, shift: float, noise: Noise) -> Tensor:
    """Each image turned by U(-rotation, rotation) radians and shifted by U(-shift, shift) pixels, bilinear.

    DMAE's augmentation: no flips, zeros come in from outside. Rows (B, D) in and out. The draws are keyed as
    all noise is, so they do not depend on the number of workers.
    """
    pictures = as_images(x, image)
    if not len(pictures):  # a worker without rows in this step
        return pictures.flatten(1)
    draws = noise.uniform("augment", 3) * 2.0 - 1.0  # (B, 3) in [-1, 1)
    angle = draws[:, 0] * rotation
    height, width = image[1], image[2]
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos, -sin * height / width, 2.0 * draws[:, 1] * shift / width], dim=1),
            torch.stack([sin * width / height, cos, 2.0 * draws[:, 2] * shift / height], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False).flatten(1)
