"""What codes look like, learnt from tokens alone: codes that stand beside each other, in place or in time, get vectors that are alike.

A copy that was encoded anew, scaled or cropped has other codes in most places (a third to four fifths of them), but codes that
stand in for each other: those that also take turns at a place that hardly changes. A few eigenvectors of how often two codes are
neighbours (a diffusion map) place each code among its like, whatever the size of the codebook and whoever made it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NUM_DIMS = 8
_REGULARISATION = 0.1
_ITERATIONS = 30
_MAX_VALUE = 6.0


def learn_code_vectors(samples: Iterable[np.ndarray], codebook_size: int) -> np.ndarray:
    """float32 (codebook_size, NUM_DIMS), centred: the mean over the codes of `samples` is 0. The same samples give the same vectors.

    Takes 8 * codebook_size**2 bytes: 0.54 GB for 8,192 codes. Codes that the samples do not hold get values near 0.

    Args:
        samples: uint16 (t h w) grids.
    """
    counts = np.zeros((codebook_size, codebook_size), np.float32)
    uses = np.zeros(codebook_size)
    for codes in samples:
        places = codes.astype(np.int64)
        uses += np.bincount(places.ravel(), minlength=codebook_size)
        for one, next_one in (
            (places[:-1], places[1:]),
            (places[:, :-1], places[:, 1:]),
            (places[:, :, :-1], places[:, :, 1:]),
        ):
            np.add.at(counts.reshape(-1), (one * codebook_size + next_one).ravel(), 1)
    counts += counts.T.copy()
    vectors = _diffusion_map(counts)
    vectors -= (uses @ vectors / max(1.0, uses.sum())).astype(np.float32)
    return vectors


def _diffusion_map(counts: np.ndarray) -> np.ndarray:
    """The leading eigenvectors of the symmetric, normalised `counts`, each scaled by its eigenvalue; without the trivial one.

    Every pair of codes counts a little more than it was seen (regularised spectral clustering), so that a handful of rare codes
    of one video do not take a dimension for themselves.
    """
    size = len(counts)
    degree = counts.sum(1)
    extra = max(1e-6, _REGULARISATION * float(degree.mean()))
    scale = (1 / np.sqrt(degree + extra)).astype(np.float32)[:, None]

    def multiply(x: np.ndarray) -> np.ndarray:
        scaled = scale * x
        product: np.ndarray = scale * (counts @ scaled + extra / size * scaled.sum(0))
        return product

    width = min(size, 2 * NUM_DIMS)
    start = np.random.default_rng(0).standard_normal((size, width)).astype(np.float32)
    basis = np.linalg.qr(np.concatenate([1 / scale, start], axis=1)[:, :width])[0]
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(multiply(basis))[0]
    values, rotation = np.linalg.eigh(basis.T @ multiply(basis))
    order = np.argsort(values)[::-1][1 : NUM_DIMS + 1]
    vectors = np.zeros((size, NUM_DIMS), np.float32)
    found = basis @ rotation[:, order] * scale * np.sqrt(float((degree + extra).sum()))
    vectors[:, : len(order)] = np.clip(found, -_MAX_VALUE, _MAX_VALUE) * np.clip(values[order], 0, 1)
    return vectors
