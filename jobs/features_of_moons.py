"""Why DMAE's published start misses the moons: k-means on what its random Fourier features know of them.

    python -m jobs.features_of_moons [--seeds 10]

For every seed the set is drawn anew. The affinity exp(-gamma |x - y|^2) of all points is taken exactly, and
as the products of random features; k-means then has the two leading eigenvectors of either, normalised as by
Ng, Jordan & Weiss 2001, or the features themselves. Prints the mean accuracy of each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from distclust.corpus.synthetic import make
from distclust.results.metrics import contingency, scores

GAMMA = 30.0
"""As in the table `dmae-synthetic`."""
FEATURES = (100, 2000)


def spectral_codes(affinity: NDArray, clusters: int) -> NDArray:
    """The leading eigenvectors of D^-1/2 A D^-1/2, (N, K), rows of length 1; A is (N, N)."""
    degrees = np.maximum(affinity.sum(axis=1), 1e-9)  # of random features it may be nothing, or less
    scaled = affinity / np.sqrt(np.outer(degrees, degrees))
    codes = np.linalg.eigh(scaled)[1][:, -clusters:]
    return codes / np.linalg.norm(codes, axis=1, keepdims=True)


def accuracies(seed: int) -> dict[str, float]:
    """Accuracy of k-means on each kind of codes, by its name."""
    from sklearn.cluster import KMeans
    from sklearn.kernel_approximation import RBFSampler

    made = make("moons", seed)
    x, y, clusters = np.asarray(made.x), made.y, 2
    square = ((x[:, None] - x[None]) ** 2).sum(axis=-1)  # (N, N)
    codes = {"eigenvectors of the exact affinity": spectral_codes(np.exp(-GAMMA * square), clusters)}
    for number in FEATURES:
        features = RBFSampler(gamma=GAMMA, n_components=number, random_state=seed).fit_transform(x)
        codes[f"{number} random features"] = features
        codes[f"eigenvectors of {number} random features"] = spectral_codes(features @ features.T, clusters)
    found = {}
    for name, of in codes.items():
        labels = KMeans(clusters, n_init=10, random_state=seed).fit_predict(of).astype(np.int64)
        found[name] = scores(contingency(y, labels, clusters, clusters)).acc
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jobs.features_of_moons", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to N-1")
    options = parser.parse_args(arguments)
    with threadpool_limits(1):  # so small that threads only wait for each other
        each = [accuracies(seed) for seed in range(options.seeds)]
    for name in each[0]:
        values = [found[name] for found in each]
        sys.stdout.write(f"{name}: {np.mean(values):.3f} (worst {min(values):.3f})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
