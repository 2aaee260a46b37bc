"""Whatever the arguments are: a result or a documented exception, no argument written to but by success, and the reference agrees."""

from __future__ import annotations

import array
import decimal
import fractions
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crossent as ce

from .layouts import arrange
from .oracle import BF16, DTYPES

# The same examples every time, unless more are asked for.
EXAMPLES = os.environ.get("CROSSENT_EXAMPLES")
SETTINGS = settings(max_examples=int(EXAMPLES or 1500), deadline=None, derandomize=EXAMPLES is None)

ODD_DTYPES = (
    *DTYPES,
    *(
        np.dtype(d)
        for d in (">f4", "i1", "u1", "i4", "i8", ">u2", "u8", "?", "F", "O", "U3", "S2", "M8[s]", "m8[s]", "g", "V2", [("a", "f4")])
    ),
    *(np.dtype(d) for d in (ml_dtypes.float8_e5m2, ml_dtypes.int4)),
)
LAYOUTS = ("C", "C", "F", "strided", "reversed", "permuted", "broadcast", "read-only", "misaligned", "subclass")


class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    def __repr__(self):
        return f"Index({self.value})"


class Number(Index):
    __index__ = None

    def __float__(self):
        return self.value


class Opaque:
    """Says of every attribute that it is broken."""

    def __getattr__(self, name):
        raise KeyError(name)


class Convertible:
    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return self.value


JUNK = (
    *(None, True, 0, 1, -1, 2, 5, -100, 255, 2**63, 2**64, -(2**70), 10**400, 0.5, 1.0, 1.5, -0.0, np.nan, np.inf, 5e-324, 1e308),
    *(
        "mean",
        "sum",
        "none",
        "abc",
        "",
        "\udc80",
        b"x",
        1j,
        [],
        [1, 2],
        [0.5],
        [[1.0, 2.0], [3.0, 4.0]],
        [[1.0, 2.0], [3.0]],
        (),
        (0,),
        (0, 1),
        (1, 1),
    ),
    *(
        np.float32(1),
        np.int8(1),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.array(1),
        np.array(0.5),
        np.array([1]),
        np.void(b"12"),
        np.str_("1"),
    ),
    *({}, {1}, object(), decimal.Decimal("0.5"), fractions.Fraction(1, 2), Index(0), Index(2**70), Number(0.5), Number("x"), Opaque()),
    *(
        Convertible(np.ones((2, 3), np.float32)),
        Convertible(5),
        array.array("f", [1, 2, 3]),
        memoryview(b"abc"),
        range(3),
        np.ma.array([1.0, 2.0]),
    ),
    *(
        ce.Mixup([0], [0], 0.5),
        ce.Mixup(None, None, None),
        ce.SparseProbs([[0]], [[1.0]]),
        ce.SparseProbs(1, 2),
        np.float32,
        len,
        ...,
        NotImplemented,
    ),
)
NAMES = (
    "logsumexp",
    "softmax",
    "log_softmax",
    "softmax_vjp",
    "log_softmax_vjp",
    "nll_loss",
    "nll_loss_with_grad",
    "cross_entropy",
    "cross_entropy_with_grad",
)
DOCUMENTED = (TypeError, ValueError, IndexError, MemoryError)


class Maker:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def one_of(self, things):
        return things[self.rng.integers(len(things))]

    def shape(self):
        return tuple(int(n) for n in self.rng.choice([0, 1, 2, 3, 4, 70], self.rng.integers(0, 4), p=[0.08, 0.2, 0.25, 0.3, 0.12, 0.05]))

    def array(self, shape=None, dtypes=ODD_DTYPES):
        shape = self.shape() if shape is None else shape
        dtype, layout = self.one_of(dtypes), self.one_of(LAYOUTS)
        values = self.rng.normal(0, 3, shape) if self.rng.random() < 0.6 else self.rng.integers(-1, 5, shape)
        try:
            with np.errstate(all="ignore"):
                a = np.asarray(values).astype(dtype)
        except (TypeError, ValueError):
            a = np.zeros(shape, dtype)
        if layout == "subclass":
            return a.view(type("Sub", (np.ndarray,), {}))
        if dtype.hasobject or dtype.kind == "V":
            return a
        return arrange(a, layout)

    def mostly(self, good, odd=0.12):
        if self.rng.random() > odd:
            return good
        return self.one_of(JUNK) if self.rng.random() < 0.6 else self.array()

    def target(self, x, rows, classes, kind):
        def labels():
            y = np.array(self.rng.integers(0, max(classes, 1), rows)).astype(
                self.one_of([np.dtype(d) for d in ("i1", "i8", "u1", "u8", ">i4")])
            )
            if y.size and self.rng.random() < 0.2:
                y.flat[-1] = 100
            return y

        if kind == "probs":
            return self.array(x.shape, DTYPES)
        if kind == "mixup":
            return ce.Mixup(self.mostly(labels()), self.mostly(labels()), self.mostly(0.3))
        if kind == "sparse":
            pairs = (*rows, 2)
            return ce.SparseProbs(self.mostly(self.rng.integers(0, max(classes, 1), pairs)), self.mostly(self.rng.random(pairs)))
        return labels()

    def call(self):
        name = self.one_of(NAMES)
        x = self.array(dtypes=(*DTYPES, np.dtype(">f4")))
        axis = int(self.rng.integers(-max(x.ndim, 1), max(x.ndim, 1)))
        rows = tuple(n for i, n in enumerate(x.shape) if i != axis % x.ndim)
        classes = x.shape[axis] if x.ndim else 1
        args, kwargs = [self.mostly(x)], {"axis": self.mostly(axis)}
        if name.endswith("vjp"):
            args.insert(0, self.mostly(self.array(x.shape, DTYPES)))
        elif "loss" in name or "entropy" in name:
            kinds = ("index", "probs", "mixup", "sparse") if "entropy" in name else ("index",)
            args.append(self.mostly(self.target(x, rows, classes, self.one_of(kinds))))
            options = {"weight": np.ones(classes), "ignore_index": -1, "reduction": self.one_of(("mean", "sum", "none"))}
            if "entropy" in name:
                options |= {"label_smoothing": 0.1, "sample_weight": np.ones(rows), "normalizer": 2.0, "z_loss": 0.1, "softcap": 3.0}
                options |= {"temperature": 2.0, "where": np.ones(x.shape, bool)}
            kwargs |= {k: self.mostly(v, 0.25) for k, v in options.items() if self.rng.random() < 0.3}
        if name == "logsumexp" and self.rng.random() < 0.3:
            kwargs["keepdims"] = self.mostly(True, 0.3)
        if name not in ("nll_loss", "cross_entropy") and self.rng.random() < 0.5:
            native = x.dtype if x.dtype == BF16 else x.dtype.newbyteorder("=")
            kwargs["out"] = self.mostly(np.full(x.shape, 7, native) if self.rng.random() < 0.6 else args[0], 0.2)
        if name.endswith("with_grad") and self.rng.random() < 0.3:
            kwargs["grad_output"] = self.mostly(2.0, 0.4)
        return name, args, kwargs


def arrays(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from arrays(item)


def bits(a):
    return repr(a) if a.dtype.hasobject else a.tobytes()


@pytest.mark.filterwarnings("ignore")
@SETTINGS
@given(st.integers(0, 2**32 - 1))
def test_any_arguments(seed):
    name, args, kwargs = Maker(seed).call()
    held = list(arrays([args, list(kwargs.values())]))
    before = [bits(a) for a in held]
    out = kwargs.get("out")
    try:
        result = getattr(ce, name)(*args, **kwargs)
    except DOCUMENTED:
        assert [bits(a) for a in held] == before, "written in spite of the error"
    except KeyError:
        assert any(isinstance(a, Opaque) for a in (*args, *kwargs.values(), *(i for a in args if isinstance(a, tuple) for i in a)))
    else:
        for a, b in zip(held, before, strict=True):
            if out is None or not np.shares_memory(a, out):
                assert bits(a) == b, "an input was written to"
        gradient = result[1] if name.endswith("with_grad") else result
        if out is not None:
            assert gradient is out
        plain = (np.ndarray, str, bool, int, float, type(None))
        if (
            out is None
            and all(type(a) is np.ndarray for a in args)
            and all(isinstance(a, plain) and (type(a) is not int or abs(a) < 2**63) for a in kwargs.values())
            # Such a divisor takes gradients beyond float64, where the order of the factors decides what is left.
            and kwargs.get("normalizer") != 5e-324
        ):
            with np.errstate(all="ignore"):
                expected = getattr(ce.reference, name)(*args, **kwargs)
            for got, exact in zip(result, expected, strict=True) if isinstance(result, tuple) else ((result, expected),):
                assert np.shape(got) == np.shape(exact)
                nan, wanted = np.isnan(np.asarray(got).astype(float)), np.asarray(exact).astype(float)
                np.testing.assert_array_equal(nan, np.isnan(wanted))
