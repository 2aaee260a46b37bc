"""Top-k log-probabilities: every k, ties and orders."""

from __future__ import annotations

import numpy as np
import pytest

import crossent as ce
from crossent import reference

from .oracle import F32, F64, eps, row_dtype
from .test_matrix import check_array


@pytest.mark.parametrize("classes", [1, 2, 7, 64, 65, 300, 513, 1030, 5000])
def test_topk(level, dtype, classes, rng):
    x = rng.normal(0, 3, (5, classes)).astype(dtype)
    for k in sorted({0, 1, 2, 3, 20, 64, 65, 257, classes // 2, classes - 1, classes}):
        if k > classes:
            continue
        logprobs, indices = ce.topk_logprobs(x, k)
        best, order = reference.topk_logprobs(x, k)
        assert logprobs.dtype == row_dtype(dtype)
        assert indices.dtype == np.int64
        assert logprobs.shape == indices.shape == (5, k)
        np.testing.assert_array_equal(indices, order)
        check_array(logprobs, best, np.abs(best), row_dtype(dtype), 6, f"k = {k}")
        if dtype in (F32, F64):
            np.testing.assert_allclose(logprobs, np.take_along_axis(ce.log_softmax(x), indices, -1), rtol=8 * 2 * eps(dtype))


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "few values", "zeros of both signs", "peaks at block ends"])
def test_topk_ties_and_orders(level, dtype, order, rng):
    for classes in (10, 600, 1300):
        x = rng.normal(0, 3, (3, classes)).astype(dtype)
        if order == "ascending":
            x.sort(-1)
        elif order == "descending":
            x = np.ascontiguousarray(np.sort(x, -1)[:, ::-1])
        elif order == "equal":
            x[:] = 1.5
        elif order == "few values":
            x = rng.integers(0, 4, x.shape).astype(dtype)
        elif order == "zeros of both signs":
            x = np.where(rng.random(x.shape) < 0.5, 0.0, -0.0).astype(dtype)
        else:
            x[:, [0, -1, classes // 2]] = 20
        for k in (1, 3, 10, classes):
            np.testing.assert_array_equal(ce.topk_logprobs(x, k)[1], reference.topk_logprobs(x, k)[1])
