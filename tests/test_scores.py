"""Scores of tokens: meaning, ignored and shifted tokens, accuracy."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import crossent as ce
from crossent import reference

from .layouts import INPUTS, arrange
from .oracle import F32, F64, INDEX_DTYPES, assert_ulps, eps, exact, row_dtype
from .test_matrix import check_array

INF, NAN = np.inf, np.nan


def check_scores(got, want, dtype, what=""):
    work = row_dtype(dtype)
    for name, a, b in zip(want._fields, got, want, strict=True):
        where = f"{what} {name}"
        if b is None:
            assert a is None, where
        elif np.asarray(b).dtype.kind == "i":
            assert a.dtype == np.int64, where
            np.testing.assert_array_equal(a, b, err_msg=where)
        else:
            assert a.dtype == work, where
            # Of logsumexp the exact result may cancel; its tests of accuracy are apart. An impossible token says nothing of the size.
            logprob = np.where(np.isfinite(want.logprob), want.logprob, 0)
            size = np.abs(b) if name != "logsumexp" else np.abs(b) + np.abs(logprob) + 1
            check_array(a, np.asarray(b), size, work, 9, where)
    np.testing.assert_array_equal(got.is_greedy, want.is_greedy)


@pytest.fixture
def x(dtype, rng):
    return rng.normal(0, 2, (4, 6, 9)).astype(dtype)


def test_scores(level, dtype, x, rng):
    y = rng.integers(0, 9, (4, 6))
    scores = ce.score_tokens(x, y, entropy=True, rank=True)
    assert isinstance(scores, ce.TokenScores)
    assert scores._fields == ("logprob", "logsumexp", "argmax", "entropy", "rank")
    check_scores(scores, reference.score_tokens(x, y, entropy=True, rank=True), dtype)
    plain = ce.score_tokens(x, y)
    assert plain.entropy is None
    assert plain.rank is None
    for name in ("logprob", "logsumexp", "argmax"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(scores, name))
    np.testing.assert_allclose(plain.logprob, -ce.cross_entropy(x, y, reduction="none"), rtol=8 * eps(row_dtype(dtype)))
    np.testing.assert_allclose(plain.logsumexp, ce.logsumexp(x), rtol=8 * eps(row_dtype(dtype)))
    assert scores.perplexity == pytest.approx(np.exp(ce.cross_entropy(x, y)), rel=8 * eps(row_dtype(dtype)))
    np.testing.assert_array_equal(scores.is_greedy, x.argmax(-1) == y)
    assert scores.is_greedy.dtype == np.bool_
    # The named tuple is one: it unpacks, copies and travels.
    assert len(tuple(scores)) == 5
    for other in (copy.copy(scores), copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert type(other) is ce.TokenScores
        np.testing.assert_array_equal(other.is_greedy, scores.is_greedy)
        assert other.perplexity == scores.perplexity


def test_a_single_token(dtype):
    scores = ce.score_tokens(np.array([1.0, 3.0, 2.0], dtype), 2, entropy=True, rank=True)
    want = reference.score_tokens([1.0, 3.0, 2.0], 2, entropy=True, rank=True)
    for value in scores:
        assert np.shape(value) == ()
    assert scores.argmax == 1
    assert scores.rank == 1
    assert not scores.is_greedy
    assert scores.logprob == pytest.approx(want.logprob, rel=1e-6)
    assert scores.perplexity == pytest.approx(want.perplexity, rel=1e-6)


def test_ignored_positions_are_never_read(level, dtype, x, rng):
    y = rng.integers(0, 9, (4, 6))
    y[rng.random(y.shape) < 0.4] = 7
    x = x.copy()
    x[y == 7] = NAN
    for given_x, given_y, axis in ((x, y, -1), (np.ascontiguousarray(x.T), y.T, 0), (np.moveaxis(x, -1, 1).copy(), y, 1)):
        got = ce.score_tokens(given_x, given_y, axis=axis, ignore_index=7, entropy=True, rank=True)
        ignored = given_y == 7
        for value, mark in zip(got, (0, 0, -1, 0, -1), strict=True):
            assert (value[ignored] == mark).all()
        assert not np.isnan(got.logprob).any()
        assert not got.is_greedy[ignored].any()
        kept = got.logprob[~ignored].astype(F64)
        assert got.perplexity == pytest.approx(np.exp(-kept.mean()), rel=1e-12)
        check_scores(got, reference.score_tokens(given_x, given_y, axis=axis, ignore_index=7, entropy=True, rank=True), dtype)
    nothing = ce.score_tokens(x, np.full_like(y, 7), ignore_index=7)
    assert np.isnan(nothing.perplexity)
    assert np.isnan(reference.score_tokens(x, np.full_like(y, 7), ignore_index=7).perplexity)


@pytest.mark.parametrize("layout", list(INPUTS))
def test_shift(level, dtype, x, rng, layout):
    y = rng.integers(0, 9, (4, 6))
    y[0, 0] = 12345  # never scored
    for axis in range(3):
        given_x, given_y = arrange(np.moveaxis(x, -1, axis).copy(), layout), arrange(y, layout)
        got = ce.score_tokens(given_x, given_y, axis=axis, shift=True, entropy=True, rank=True)
        want = ce.score_tokens(x[:, :-1].copy(), y[:, 1:].copy(), entropy=True, rank=True)
        for a, b in zip(got, want, strict=True):
            assert a.shape == (4, 5)
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(got.is_greedy, want.is_greedy)
        assert got.perplexity == want.perplexity
    one = ce.score_tokens(x[:, :1], y[:, :1], shift=True)
    assert one.logprob.shape == (4, 0)
    assert np.isnan(one.perplexity)
    assert ce.score_tokens(x[:, :0], y[:, :0], shift=True).logprob.shape == (4, 0)
    assert ce.score_tokens(x[0], y[0], shift=True).logprob.shape == (5,)


def test_every_integer_type_of_tokens(dtype):
    x = np.random.default_rng(0).normal(0, 2, (5, 4)).astype(dtype)
    y = np.array([0, 3, 1, 2, 3])
    want = ce.score_tokens(x, y)
    for index in INDEX_DTYPES:
        for tokens in (y.astype(index), y.astype(index.newbyteorder())):
            np.testing.assert_array_equal(ce.score_tokens(x, tokens).logprob, want.logprob)


def test_a_token_without_probability_beside_a_small_logsumexp():
    p = np.array([[-INF, 0.0, -3.0], [-INF, -INF, -INF]], np.float32)
    for y in ([0, 0], [1, 2]):
        check_scores(ce.score_tokens(p, y), reference.score_tokens(p, y), p.dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
@pytest.mark.parametrize("classes", [2, 10, 100, 1100])
def test_ulps_of_scores(level, dtype, classes, rng):
    for scale, lift in ((1, 0), (5, 0), (3, 1e4), (0.01, 0), (3, -1e6)):
        x = (rng.normal(0, scale, (40, classes)) + lift).astype(dtype)
        x[::2, classes // 2] += rng.uniform(5, 60, 20).astype(dtype)
        for y in (rng.integers(0, classes, 40), x.argmax(-1)):
            row = exact(x)
            got = ce.score_tokens(x, y, entropy=True)
            at = (np.arange(40), y)
            assert_ulps(got.logprob, row.log_probs[at], dtype, 4, what="logprob")
            assert_ulps(got.logsumexp, row.logsumexp, dtype, 4, scale=np.maximum(np.abs(row.m), np.abs(row.logsumexp.hi)), what="logsumexp")
            assert_ulps(got.entropy, -(row.probs * row.log_probs).sum(), dtype, 8, what="entropy")
        logprobs, indices = ce.topk_logprobs(x, min(classes, 9))
        rows = np.arange(40)[:, None]
        assert_ulps(logprobs, row.log_probs[rows, indices], dtype, 4, what="topk")


def test_entropy_of_known_distributions(level, dtype):
    for classes in (1, 2, 8, 64, 1024):
        got = ce.score_tokens(np.zeros((1, classes), dtype), [0], entropy=True).entropy
        np.testing.assert_allclose(got, np.log(classes), rtol=4 * eps(row_dtype(dtype)), atol=0)
    confident = ce.score_tokens(np.array([[40.0, 0.0]], dtype), [0], entropy=True)
    # p·log(1/p) of the other class and the rest of the first: e^−40·(40 + 1).
    np.testing.assert_allclose(confident.entropy, 41 * np.exp(-40.0), rtol=1e-6)
    np.testing.assert_allclose(confident.logprob, -np.exp(-40.0), rtol=1e-6)
