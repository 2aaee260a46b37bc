"""The same bits for every number of threads; rows that do not depend on each other; means that are sums of the rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

import crossent as ce

from .oracle import F64

# Few classes in many rows, many classes in few rows, one huge row, inner axes: each large enough to be shared by threads.
SHAPES = {
    "many small rows": ((40_000, 10), -1),
    "two classes": ((100_001, 2), -1),
    "one class": ((100_001, 1), -1),
    "100 classes": ((3000, 100), -1),
    "1000 classes": ((300, 1000), -1),
    "few long rows": ((5, 70_001), -1),
    "one huge row": ((262_144,), -1),
    "NCHW": ((3, 21, 80, 61), 1),
    "columns": ((300, 1501), 0),
}


def problem(name, dtype, seed=0):
    shape, axis = SHAPES[name]
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, shape).astype(dtype)
    rows = np.delete(shape, axis)
    y = rng.integers(0, shape[axis], rows)
    y = np.where(rng.random(rows) < 0.1, -100, y) if y.ndim else y
    weight = rng.random(shape[axis]) + 0.1
    return x, y, axis, weight


def everything(x, y, axis, weight):
    """Bits of all results."""
    results = [ce.softmax(x, axis), ce.log_softmax(x, axis), ce.logsumexp(x, axis)]
    results += [ce.softmax_vjp(x, results[0], axis), ce.log_softmax_vjp(x, results[1], axis)]
    for reduction in ("mean", "sum", "none"):
        options = {"axis": axis, "weight": weight, "reduction": reduction}
        results += [ce.cross_entropy(x, y, label_smoothing=0.1, **options), *ce.cross_entropy_with_grad(x, y, **options)]
        results += [ce.nll_loss(x, y, **options), *ce.nll_loss_with_grad(x, y, **options)]
    probs = np.abs(x)
    results += [ce.cross_entropy(x, probs, axis=axis), *ce.cross_entropy_with_grad(x, probs, axis=axis, weight=weight)]
    return [np.asarray(r).tobytes() for r in results]


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_for_every_number_of_threads(level, dtype, name):
    case = problem(name, dtype)
    with ce.threads(1):
        want = everything(*case)
    for n in (2, 3, 5):
        with ce.threads(n):
            assert ce.get_num_threads() == n
            assert everything(*case) == want, f"{n} threads differ from 1"


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_in_every_path(level, dtype, name):
    """With and without gradient, into out, in place: the same loss and the same gradient."""
    x, y, axis, weight = problem(name, dtype)
    options = {"axis": axis, "weight": weight, "label_smoothing": 0.1}
    loss = ce.cross_entropy(x, y, **options)
    fresh_loss, fresh = ce.cross_entropy_with_grad(x, y, **options)
    out = np.empty_like(x)
    out_loss, _ = ce.cross_entropy_with_grad(x, y, out=out, **options)
    place = x.copy()
    place_loss, _ = ce.cross_entropy_with_grad(place, y, out=place, **options)
    assert loss == fresh_loss == out_loss == place_loss
    assert fresh.tobytes() == out.tobytes() == place.tobytes()
    for f in (ce.softmax, ce.log_softmax):
        fresh = f(x, axis)
        place = x.copy()
        f(place, axis, out=place)
        assert fresh.tobytes() == place.tobytes() == f(x, axis, out=out).tobytes()


@pytest.mark.parametrize("classes", [65, 81, 127, 1000, 1031, 4099, 70_001])
def test_large_results_are_those_of_their_rows(level, dtype, classes):
    """Written past the caches, wherever lines begin, also where rows do not follow each other."""
    rng = np.random.default_rng(classes)
    n = (17 << 20) // (classes * dtype.itemsize) + 1
    x = rng.normal(0, 3, (n, classes)).astype(np.float32).astype(dtype)
    y = rng.integers(0, classes, n)
    parts = np.array_split(np.arange(n), 8)
    logs = np.concatenate([ce.log_softmax(x[part]) for part in parts])
    grad = np.concatenate([ce.cross_entropy_with_grad(x[part], y[part], reduction="none")[1] for part in parts])
    room = np.empty((n + 1) * classes + 64, dtype)
    for shift in (0, 7, 33):
        out = room[shift : shift + n * classes].reshape(n, classes)
        before, after = room[:shift].copy(), room[shift + n * classes :].copy()
        assert ce.log_softmax(x, out=out).tobytes() == logs.tobytes()
        assert ce.cross_entropy_with_grad(x, y, reduction="none", out=out)[1].tobytes() == grad.tobytes()
        assert room[:shift].tobytes() == before.tobytes()
        assert room[shift + n * classes :].tobytes() == after.tobytes()
    gaps = np.zeros((n, classes + 3), dtype)
    assert ce.log_softmax(x, out=gaps[:, 1:-2]).tobytes() == logs.tobytes()
    assert not gaps[:, 0].any()
    assert not gaps[:, -2:].any()


@pytest.mark.parametrize(("classes", "width"), [(2, 32_768), (5, 8192), (21, 4099), (100, 1024), (100, 1031)])
def test_large_results_are_those_of_their_columns(level, dtype, classes, width):
    rng = np.random.default_rng(classes)
    n = (17 << 20) // (classes * width * dtype.itemsize) + 1
    x = rng.normal(0, 3, (n, classes, width)).astype(np.float32).astype(dtype)
    y = rng.integers(0, classes, (n, width))
    parts = np.array_split(np.arange(n), 8)
    logs = np.concatenate([ce.log_softmax(x[part], 1) for part in parts])
    grad = np.concatenate([ce.cross_entropy_with_grad(x[part], y[part], axis=1, reduction="none")[1] for part in parts])
    room = np.zeros(x.size + 64, dtype)
    for shift in (0, 4, 9):
        out = room[shift : shift + x.size].reshape(x.shape)
        assert ce.log_softmax(x, 1, out=out).tobytes() == logs.tobytes()
        assert ce.cross_entropy_with_grad(x, y, axis=1, reduction="none", out=out)[1].tobytes() == grad.tobytes()
        assert not room[:shift].any()
        assert not room[shift + x.size :].any()
        room[:] = 0


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 16, 17, 33, 64, 65, 100, 513, 2000])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_a_row_does_not_depend_on_the_others(level, dtype, classes, columns):
    rng = np.random.default_rng(classes)
    n = 150
    x = rng.normal(0, 3, (n, classes)).astype(dtype)
    # Neighbours of every kind.
    x[3], x[10], x[20, 0] = -np.inf, np.nan, np.inf
    x[30] *= dtype.type(1000)
    y = rng.integers(0, classes, n)
    y[40:45] = -100

    wide = np.ascontiguousarray(x.T)

    def rows(index):
        # A slice of the columns is a view, so that the classes stay strided even where one row is left.
        given, axis = (wide[:, index], 0) if columns else (x[index], 1)
        if columns and not isinstance(index, slice):
            given = np.ascontiguousarray(given)
        loss, grad = ce.cross_entropy_with_grad(given, y[index], axis=axis, label_smoothing=0.1, reduction="none")
        results = [grad, ce.softmax(given, axis), ce.log_softmax(given, axis)]
        return [loss, ce.logsumexp(given, axis), *(r.T if columns else r for r in results)]

    whole = rows(slice(None))

    def check(index):
        for result, all_of_them in zip(rows(index), whole, strict=True):
            # Equal numbers are equal bits but for the sign of zero, which is compared too; a nan has no value to compare.
            got, want = result.astype(F64), all_of_them[index].astype(F64)
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(np.signbit(got) | np.isnan(got), np.signbit(want) | np.isnan(want))

    check(rng.permutation(n))
    check(np.arange(n)[::-1])
    for start, stop in ((0, 1), (1, 2), (40, 41), (149, 150), (7, 22), (1, 149), (13, 77)):
        check(slice(start, stop))


def test_the_gradient_of_a_row_does_not_depend_on_ignored_ones(level, dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 3, (500, 30)).astype(dtype)
    y = rng.integers(0, 30, 500)
    full, _ = ce.cross_entropy_with_grad(x, y, reduction="none")
    some = np.where(np.arange(500) % 3 == 0, y, -100)
    loss, grad = ce.cross_entropy_with_grad(x, some, reduction="none")
    np.testing.assert_array_equal(loss[::3], full[::3])
    np.testing.assert_array_equal(grad[::3], ce.cross_entropy_with_grad(x[::3], y[::3], reduction="none")[1])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_and_sum_are_those_of_the_rows(level, dtype, name, smoothing):
    """To 1e-15, relative: the sum is carried in float64 or better."""
    x, y, axis, weight = problem(name, dtype)
    options = {"axis": axis, "weight": weight, "label_smoothing": smoothing}
    rows = ce.cross_entropy(x, y, reduction="none", **options)
    exact = math.fsum(np.asarray(rows).astype(F64).ravel())
    divisor = math.fsum(np.where(y == -100, 0.0, weight[np.maximum(y, 0)]).ravel())
    assert abs(ce.cross_entropy(x, y, reduction="sum", **options) - exact) <= 1e-15 * exact
    assert abs(ce.cross_entropy(x, y, **options) - exact / divisor) <= 2e-15 * exact / divisor
    with np.errstate(all="ignore"):
        log_probs = ce.log_softmax(x, axis)
    rows = ce.nll_loss(log_probs, y, axis=axis, weight=weight, reduction="none")
    exact = math.fsum(np.asarray(rows).astype(F64).ravel())
    assert abs(ce.nll_loss(log_probs, y, axis=axis, weight=weight) - exact / divisor) <= 2e-15 * abs(exact / divisor)


def test_repeated_calls_give_the_same_bits(level, dtype):
    case = problem("1000 classes", dtype)
    want = everything(*case)
    for _ in range(3):
        assert everything(*case) == want


@pytest.mark.usefixtures("level")
def test_small_calls_have_a_shortcut_that_changes_nothing():
    # An option that is off, but not at a glance, takes the long way.
    long_way = {"temperature": np.float64(1.0)}
    rng = np.random.default_rng(5)
    special = [0.0, 1e4, -1e6, np.inf, -np.inf, np.nan, 3e38]
    for rows in (1, 2, 15, 16, 17, 33, 64, 65):
        for classes in (2, 3, 4, 5, 10, 31, 32, 33):
            x = (rng.standard_normal((rows, classes)) * 10).astype(np.float32)
            y = rng.integers(0, classes, rows)
            for value in special:
                odd = x.copy()
                odd[rng.integers(0, rows), rng.integers(0, classes)] = value
                for labels in (y, np.where(np.arange(rows) % 3 == 1, -100, y)):
                    loss, grad = ce.cross_entropy_with_grad(odd, labels)
                    want, want_grad = ce.cross_entropy_with_grad(odd, labels, **long_way)
                    np.testing.assert_array_equal([loss, ce.cross_entropy(odd, labels)], [want, want])
                    np.testing.assert_array_equal(grad, want_grad)
    with pytest.raises(IndexError, match=r"target\[1\] = 10 is out of bounds"):
        ce.cross_entropy_with_grad(np.zeros((3, 10), np.float32), np.array([0, 10, 1]))
    with pytest.raises(ValueError, match="target has shape"):
        ce.cross_entropy(np.zeros((3, 10), np.float32), np.array([0, 1]))
