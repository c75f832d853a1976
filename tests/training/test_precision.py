"""bfloat16: which products are in it and which never are, and that training in it is training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import runs
from corpora import make_corpus
from distclust.config import RunConfig
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError
from distclust.mixture.methods import METHODS
from distclust.mixture.precision import MixedProducts, product_type
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import NoHooks, Position
from distclust.training.world import World

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """The shapes and types of all matrix products; convolutions by their weights' shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or name == "convolution":
            right = args[2] if name in ("addmm", "baddbmm") else args[1]
            self.seen.append((tuple(right.shape), right.dtype))
        return func(*args, **(kwargs or {}))

    def of(self, kind: torch.dtype) -> set[tuple[int, ...]]:
        return {shape for shape, found in self.seen if found == kind}


class Losses(NoHooks):
    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.last = stop, {}

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        self.last[phase] = metrics["loss"]

    def after_step(self, position: Position) -> None:
        if position.global_step == self.stop:
            raise InterruptedError


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", shard_rows=runs.SHARD_ROWS, n_features=64)


def trainer(config: RunConfig, corpus: Corpus, folder: Path, stop: int | None = None) -> Trainer:
    return Trainer(config, corpus, CheckpointStore(str(folder / "checkpoints")), World(), Losses(stop))


def products_of_a_step(trainer: Trainer, name: str = "pretrain") -> Products:
    """The products of one step's loss, forward, with the phase of that name."""
    (phase,) = (phase for phase in trainer.phases if phase.name == name)
    loss = trainer.wrap(phase, {})
    seen = Products()
    forward = loss.forward

    def watched(*args: Any) -> Any:
        with seen:
            return forward(*args)

    loss.forward = watched  # type: ignore[method-assign]
    trainer.step(phase, next(iter(trainer.stream.epoch(0))), loss)
    return seen


def config_of(method: str, precision: str, **model: Any) -> RunConfig:
    order = {"lanes": 6, "rows_per_lane": 10, "window": 2}
    return runs.tiny_config(method, precision=precision, order=order, model=model)


def test_an_autoencoders_hidden_layers_are_in_bfloat16_and_its_codes_and_error_are_not(
    corpus: Corpus, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden": [12, 9], "code_size": 4}
    seen = products_of_a_step(trainer(config_of("idec", "bfloat16", **sizes), corpus, tmp_path / "half"))
    # 64 -> 12 is a sparse product; 12 -> 9 | 9 -> 4 | 4 -> 9, 9 -> 12 | the Gram form's W'W and h(W'W)
    assert seen.of(torch.bfloat16) == {(12, 9), (4, 9), (9, 12)}
    assert (9, 4) in seen.of(torch.float32), "the codes' layer"
    assert {(1, 64, 12), (1, 12, 12)} <= seen.of(torch.float32), "the Gram form"
    whole = products_of_a_step(trainer(config_of("idec", "auto", **sizes), corpus, tmp_path / "whole"))
    assert not whole.of(torch.bfloat16), "auto is float32 on a CPU"


@pytest.mark.parametrize("threshold", [0.0, 0.2], ids=["all experts", "top-m"])
def test_experts_inner_layers_are_in_bfloat16_and_their_errors_are_not(
    corpus: Corpus, tmp_path: Path, threshold: float
) -> None:
    sizes: dict[str, Any] = {"expert_hidden": [6, 9], "expert_code_size": 5, "gate_hidden": [7, 11]}
    one = trainer(config_of("damic", "bfloat16", expert_threshold=threshold, **sizes), corpus, tmp_path)
    half = products_of_a_step(one, "joint").of(torch.bfloat16)
    inner = {shape[-2:] for shape in half}
    assert inner == {(7, 11), (6, 9), (5, 9), (9, 6)}, "gate, and experts 6 -> 9 -> codes of 5 -> 9 -> 6"


def test_convolutions_are_in_bfloat16_and_the_image_they_end_in_is_not(
    corpus: Corpus, tmp_path: Path
) -> None:
    conv: dict[str, Any] = {"image": (1, 8, 8), "conv": ((5, 3, 1, 1), (6, 3, 1, 2)), "code_size": 4}
    seen = products_of_a_step(trainer(config_of("ae-kmeans", "bfloat16", **conv), corpus, tmp_path))
    kernels = {kind: {s for s in seen.of(kind) if len(s) == 4} for kind in (torch.bfloat16, torch.float32)}
    assert kernels[torch.bfloat16] == {(5, 1, 3, 3), (6, 5, 3, 3)}
    assert kernels[torch.float32] == {(5, 1, 3, 3)}, "the transposed one that makes the image"


@pytest.mark.parametrize("method", [m for m in METHODS if not all(p.by_sweeps for p in METHODS[m].phases)])
def test_every_row_trains_in_bfloat16_and_predicts_in_float32(
    corpus: Corpus, tmp_path: Path, method: str
) -> None:
    one = trainer(runs.tiny_config(method, precision="bfloat16"), corpus, tmp_path)
    one.run()
    hooks = one.hooks
    assert isinstance(hooks, Losses)
    assert all(math.isfinite(loss) for loss in hooks.last.values())
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}
    batch = next(iter(one.stream.scan()))
    with Products() as seen:
        one.model.predict(one.rows(batch))
    assert not seen.of(torch.bfloat16)


@pytest.mark.parametrize(("method", "phase"), [("idec", "pretrain"), ("damic", "joint")])
def test_a_steps_loss_and_gradients_are_float32s_to_bfloat16s_precision(
    corpus: Corpus, tmp_path: Path, method: str, phase: str
) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        one = trainer(config_of(method, precision), corpus, tmp_path / precision)
        products_of_a_step(one, phase)
        found[precision] = one
    exact, mixed = found["float32"], found["bfloat16"]
    for term, value in exact.sums.items():
        if term.startswith("term/"):
            assert float(mixed.sums[term]) == pytest.approx(float(value), rel=0.01)
    differ = 0
    for name, parameter in exact.trained.items():
        other = mixed.trained[name].grad
        assert parameter.grad is not None
        assert other is not None
        assert float((parameter.grad - other).norm()) <= 0.03 * float(parameter.grad.norm()) + 1e-6, name
        differ += not torch.equal(parameter.grad, other)
    assert differ > len(exact.trained) // 2


def test_a_resumed_run_ends_with_the_same_bits(corpus: Corpus, tmp_path: Path) -> None:
    config = runs.tiny_config("damic-text", precision="bfloat16")
    whole = trainer(config, corpus, tmp_path / "whole")
    whole.run()
    with pytest.raises(InterruptedError):
        trainer(config, corpus, tmp_path / "part", stop=11).run()
    resumed = trainer(config, corpus, tmp_path / "part")
    resumed.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_an_error_in_a_step_leaves_no_module_in_bfloat16(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(runs.tiny_config("damic", precision="bfloat16"), corpus, tmp_path)

    def fails(*_: Any) -> Any:
        assert any(m.product_type for m in one.model.modules() if isinstance(m, MixedProducts))
        raise InterruptedError

    monkeypatch.setattr(one.model, "term_values", fails)
    with pytest.raises(InterruptedError):
        products_of_a_step(one)
    assert not any(m.product_type for m in one.model.modules() if isinstance(m, MixedProducts))


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_asks_the_gpu(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    cuda = torch.device("cuda")
    assert product_type("auto", cuda) == (torch.bfloat16 if has_it else None)
    assert product_type("float32", cuda) is None
    assert product_type("auto", CPU) is None
    assert product_type("bfloat16", CPU) == torch.bfloat16


def test_another_type_is_refused_and_the_types_are_part_of_a_run() -> None:
    with pytest.raises(ConfigError, match=r"precision.*float16.*bfloat16"):
        runs.tiny_config("damic", precision="float16")
    assert runs.tiny_config("damic").identity() != runs.tiny_config("damic", precision="bfloat16").identity()
