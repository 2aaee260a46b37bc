"""Test cases that hold every pair of values of every two factors."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def pairwise(factors: dict[str, Sequence], seed: int) -> list[dict]:
    """Greedy: each case is the best of a few random ones that start from a pair not seen yet."""
    rng = np.random.default_rng(seed)
    names = list(factors)
    sizes = [len(factors[n]) for n in names]
    columns = itertools.combinations(range(len(names)), 2)
    missing = {(a, i, b, j) for a, b in columns for i in range(sizes[a]) for j in range(sizes[b])}
    order = sorted(missing)
    rng.shuffle(order)
    cases = []
    for pair in order:
        a, i, b, j = map(int, pair)
        if (a, i, b, j) not in missing:
            continue
        candidates = []
        for _ in range(12):
            pick = [int(rng.integers(len(factors[n]))) for n in names]
            pick[a], pick[b] = i, j
            covered = {(c, pick[c], d, pick[d]) for c, d in itertools.combinations(range(len(names)), 2)} & missing
            candidates.append((len(covered), pick, covered))
        _, pick, covered = max(candidates, key=lambda c: c[0])
        missing -= covered
        cases.append({n: factors[n][k] for n, k in zip(names, pick, strict=True)})
    assert not missing
    return cases
