"""A network and a dissimilarity of a user's own: what a row needs of them, said before it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distclust.mixture.energies import CentroidEnergy, StudentEnergy
from distclust.mixture.imports import import_object, is_import_path
from distclust.mixture.method import Method
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import Rows, SparseRows

if TYPE_CHECKING:
    from distclust.mixture.model import MixtureModel


def build_network(n_features: int, s: ModelSettings) -> nn.Module:
    """The network of a user's own that `model.network` names.

    Raises:
        ValueError: it is no module with codes, or cannot be made.
    """
    kind = import_object(s.network)
    try:
        made = kind(n_features, s)
    except Exception as error:  # whatever a user's code raises
        said = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model.network is {s.network}, and making it failed ({said}); expected a torch.nn.Module made "
            f"by {s.network.partition(':')[2]}(n_features, settings): mend it"
        ) from error
    if not isinstance(made, nn.Module) or not hasattr(made, "code_size"):
        raise ValueError(
            f"model.network is {s.network}, which makes a {type(made).__name__}; expected a torch.nn.Module "
            "with a code_size, as distclust.mixture.networks.Network describes it"
        )
    return made


def check_members(network: nn.Module, method: Method, path: str) -> None:
    """Refuse a network of a user's own that lacks what the row calls.

    Raises:
        ValueError: naming the members.
    """
    needed = ["encode", "encode_with_layers", "recon_error"]
    if "layer_reconstruction" in method.terms:
        needed.append("layer_errors")
    lacking = [name for name in needed if not callable(getattr(network, name, None))]
    if lacking:
        raise ValueError(
            f"model.network is {path}, which has no {' and no '.join(lacking)}; {method.name} needs "
            f"{', '.join(needed)} of it, as distclust.mixture.networks has them: add what is missing, or use "
            "another row"
        )


@torch.no_grad()
def try_own_parts(model: MixtureModel, *, sparse: bool) -> None:
    """Call a user's own network and dissimilarity once, on two rows of zeros.

    The model is to be thrown away: a network may count the rows that it sees.

    Raises:
        ValueError: a part that fails, or whose answer is not what the row reads.
    """
    if model.settings.network:
        _try_network(model, two_rows(model.n_features, sparse))
    energy = model.energy
    own = is_import_path(model.settings.dissimilarity)
    if own and isinstance(energy, CentroidEnergy) and not isinstance(energy, StudentEnergy):
        _try_dissimilarity(model, energy)


def _try_network(model: MixtureModel, x: Rows) -> None:
    path, network, row = model.settings.network, model.network, model.method.name

    def ask(name: str, shape: tuple[int, ...], *inputs: Any) -> Any:
        try:
            answer = getattr(network, name)(*inputs)
            found = answer[0] if name == "encode_with_layers" else answer
            right = tuple(found.shape) == shape
        except Exception as error:  # whatever a user's code raises
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{_of(path, name)} failed on two rows of zeros ({said}); mend it") from error
        if not right:
            raise ValueError(
                f"{_of(path, name)} gives the shape {tuple(found.shape)} for two rows; expected {shape}"
            )
        return answer

    codes = (2, model.code_size)
    ask("encode", codes, x)
    z, layers = ask("encode_with_layers", codes, x)
    lacking = [name for name in ("mean", "log_variance") if name not in layers]
    if model.method.network == "variational" and lacking:
        raise ValueError(
            f"{_of(path, 'encode_with_layers')} hands on no {' and no '.join(lacking)}, which {row} needs "
            "beside the codes, as distclust.mixture.networks.VariationalAutoencoder has them: add what is "
            "missing, or use another row"
        )
    ask("recon_error", (2,), z, x, layers)
    if "layer_reconstruction" in model.method.terms:
        ask("layer_errors", (2,), z, layers)


def _try_dissimilarity(model: MixtureModel, energy: CentroidEnergy) -> None:
    path, k, j = model.settings.dissimilarity, model.n_clusters, model.code_size
    codes, centroids = torch.zeros(2, 1, j), torch.zeros(k, j)
    try:
        found: Tensor = energy.dissimilarity.formula(codes, centroids, energy.options)
        right = tuple(found.shape) == (2, k)
    except Exception as error:  # whatever a user's code raises
        raise ValueError(
            f"model.dissimilarity is {path}, which failed on zeros of the shapes {tuple(codes.shape)} and "
            f"{tuple(centroids.shape)} ({type(error).__name__}: {error}); expected it to take x and y that "
            "broadcast against each other"
        ) from error
    if not right:
        raise ValueError(
            f"model.dissimilarity is {path}, which gives the shape {tuple(found.shape)} for x of "
            f"{tuple(codes.shape)} and y of {tuple(centroids.shape)}; expected {(2, k)}: one number for each "
            "pair, summed over the last axis"
        )


def two_rows(n_features: int, sparse: bool) -> Rows:
    """Two rows of zeros, to call a model with."""
    if not sparse:
        return torch.zeros(2, n_features)
    none = torch.zeros(0, dtype=torch.int32)
    return SparseRows(torch.zeros(3, dtype=torch.int32), none, torch.zeros(0), n_features)


def _of(path: str, name: str) -> str:
    return f"model.network is {path}, whose {name}"
