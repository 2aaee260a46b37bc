"""Arrays of other libraries, which arrive by DLPack: fake ones everywhere, those of PyTorch and JAX where they are installed."""

from __future__ import annotations

import enum
import gc
import sys

import numpy as np
import pytest

import crossent as ce

from .oracle import BF16, DTYPES, F32

try:
    import torch
except ImportError:
    torch = None
try:
    import jax.numpy as jnp
except ImportError:
    jnp = None

X = np.random.default_rng(0).normal(0, 2, (6, 5)).astype(np.float32)
Y = np.array([0, 1, 2, 3, 4, 0])


class Versioned:
    """What newer libraries have."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


class Legacy(Versioned):
    """What older ones have: no max_version."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


FAKES = (Versioned, Legacy)


@pytest.mark.parametrize("kind", FAKES)
def test_the_same_as_the_array(kind):
    for dtype in (np.float16, np.float32, np.float64):
        x = X.astype(dtype)
        for given in (x, np.asfortranarray(x), x[:, ::2], x[::-1], x[:0], x[0], np.broadcast_to(x[:1].copy(), (6, 5)).copy()):
            for f in (ce.softmax, ce.log_softmax, ce.logsumexp):
                got = f(kind(given))
                assert type(got) is type(f(given))
                np.testing.assert_array_equal(got, f(given))
        for labels in (Y, Y.astype(np.uint8), Y.astype(np.int16)):
            loss, grad = ce.cross_entropy_with_grad(
                kind(x), kind(labels), weight=kind(np.arange(5.0)), sample_weight=kind(np.ones(6, np.float32))
            )
            want, want_grad = ce.cross_entropy_with_grad(x, labels, weight=np.arange(5.0), sample_weight=np.ones(6, np.float32))
            assert loss == want
            np.testing.assert_array_equal(grad, want_grad)
        assert ce.cross_entropy(x, kind(np.full((6, 5), 0.2, dtype))) == ce.cross_entropy(x, np.full((6, 5), 0.2, dtype))
        assert ce.cross_entropy(x, Y, where=kind(np.ones((6, 5), bool))) == ce.cross_entropy(x, Y)
        rows = np.arange(6.0)
        _, grad = ce.cross_entropy_with_grad(x, Y, reduction="none", grad_output=kind(rows))
        np.testing.assert_array_equal(grad, ce.cross_entropy_with_grad(x, Y, reduction="none", grad_output=rows)[1])


def test_read_only_memory_is_read():
    x = X.copy()
    x.flags.writeable = False
    np.testing.assert_array_equal(ce.softmax(Versioned(x)), ce.softmax(X))


@pytest.mark.parametrize("kind", FAKES)
def test_what_is_lent_is_given_back(kind):
    x = X.copy()
    before = sys.getrefcount(x)
    for _ in range(50):
        ce.cross_entropy_with_grad(kind(x), Y)
        with pytest.raises(IndexError):
            ce.cross_entropy(kind(x), Y + 3)
        with pytest.raises(TypeError):
            ce.cross_entropy(x, Y, where=kind(x))
    gc.collect()
    assert sys.getrefcount(x) == before


def test_other_devices():
    class Device(enum.IntEnum):
        CUDA = 2
        ROCM = 10

    for device, name in (
        ((2, 1), "cuda:1"),
        ((Device.CUDA, 0), "cuda:0"),
        ((Device.ROCM, 0), "rocm:0"),
        ((8, 0), "metal:0"),
        ((99, 3), "99"),
    ):
        for call in (
            ce.softmax,
            lambda far: ce.cross_entropy(far, Y),
            lambda far: ce.cross_entropy(X, far),
            lambda far: ce.cross_entropy(X, Y, weight=far),
            lambda far: ce.cross_entropy_with_grad(X, Y, reduction="none", grad_output=far),
        ):
            with pytest.raises(ValueError, match=rf"(?s){name}.*CPU"):
                call(Versioned(X, device))
    for device in ((1, 0), (3, 0), (11, 0)):
        np.testing.assert_array_equal(ce.softmax(Versioned(X, device)), ce.softmax(X))


def test_producers_that_misbehave():
    class Refuses(Versioned):
        def __dlpack__(self, **options):
            raise BufferError("not today")

    class NoCapsule(Versioned):
        def __dlpack__(self, **options):
            return 5

    class Used(Versioned):
        def __dlpack__(self, **options):
            return self.array

    with pytest.raises(ValueError, match=r"(?s)x.*not today"):
        ce.softmax(Refuses(X))
    with pytest.raises(TypeError, match="capsule"):
        ce.softmax(NoCapsule(X))
    once = Used(X.__dlpack__())
    np.testing.assert_array_equal(ce.softmax(once), ce.softmax(X))
    with pytest.raises(TypeError, match="used"):
        ce.softmax(once)
    for device in ("cpu", None, (1,), (1.5, 0)):
        with pytest.raises(TypeError, match=r"__dlpack_device__\(\)"):
            ce.softmax(Versioned(X, device))
    with pytest.raises(TypeError, match="complex64"):
        ce.softmax(Versioned(X.astype(np.complex64)))
    with pytest.raises(TypeError, match="int32"):
        ce.softmax(Versioned(X.astype(np.int32)))


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SystemExit])
def test_what_ends_more_than_a_call_passes(reason):
    class Endless:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            raise reason

    with pytest.raises(reason):
        ce.softmax(Endless())


def test_negated_views_are_refused():
    """PyTorch lends them as if their memory had their sign."""

    class Negated(Versioned):
        def is_neg(self):
            return True

    with pytest.raises(ValueError, match=r"x\.resolve_neg\(\)"):
        ce.softmax(Negated(X))


def test_tensors_that_learn_say_detach():
    class Learns(Versioned):
        requires_grad = True

        def __dlpack__(self, **options):
            raise BufferError("requires gradient")

    with pytest.raises(ValueError, match=r"logits\.detach\(\)"):
        ce.cross_entropy(Learns(X), Y)


# --- lazy collections ---------------------------------------------------------------------------------------------------------------------


def lazy(module, protocol):
    def compute(self, *args, **kwargs):
        raise AssertionError("computed silently")

    members = {"__array__": compute, "compute": compute, "shape": X.shape, "dtype": X.dtype}
    if protocol:
        members["__dask_graph__"] = lambda self: {}
    thing = type("Array", (), members)
    thing.__module__ = module
    return thing()


@pytest.mark.parametrize(("module", "protocol"), [("dask.array.core", True), ("dask.array.core", False), ("elsewhere", True)])
def test_lazy_arrays_are_not_computed(module, protocol):
    for call in (
        ce.softmax,
        lambda x: ce.cross_entropy(x, Y),
        lambda x: ce.cross_entropy(X, x),
        lambda x: ce.cross_entropy(X, ce.Mixup(Y, Y, x)),
        lambda x: ce.cross_entropy(X, Y, weight=x),
        lambda x: ce.cross_entropy(X, Y, sample_weight=x),
        lambda x: ce.cross_entropy(X, Y, where=x),
        lambda x: ce.softmax_vjp(X, x),
        lambda x: ce.softmax(X, out=x),
    ):
        with pytest.raises(TypeError, match=module if module.startswith("dask") else "dask|ndarray"):
            call(lazy(module, protocol))


# --- the libraries themselves -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
def test_tensors_of_pytorch():
    for dtype in DTYPES:
        t = torch.tensor(X).to(getattr(torch, dtype.name))
        same = t.to(torch.float64).numpy().astype(dtype)
        for given, array in ((t, same), (t.T, same.T), (t[:, ::2], same[:, ::2]), (t[:1].expand(6, 5), np.broadcast_to(same[:1], (6, 5)))):
            got = ce.softmax(given)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, ce.softmax(array))
        assert ce.cross_entropy(t, torch.tensor(Y)) == ce.cross_entropy(same, Y)
        with pytest.raises(ValueError, match="detach"):
            ce.softmax(t.clone().requires_grad_())
    x = torch.randn(3, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match="resolve_neg"):
        ce.softmax(x.conj().imag)
    np.testing.assert_array_equal(ce.softmax(x.conj().imag.resolve_neg()), ce.softmax(-x.imag.contiguous()))
    t = torch.tensor(X)
    assert ce.softmax(t, out=t.numpy()).base is not None
    np.testing.assert_array_equal(t.numpy(), ce.softmax(X))


@pytest.mark.skipif(jnp is None, reason="JAX is not installed")
def test_arrays_of_jax():
    for dtype in (np.dtype(np.float16), BF16, F32):
        same = X.astype(dtype)
        got = ce.softmax(jnp.asarray(same))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, ce.softmax(same))
        assert ce.cross_entropy(jnp.asarray(same), jnp.asarray(Y)) == ce.cross_entropy(same, Y)
