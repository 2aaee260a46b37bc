"""Memory: what calls take, what they recycle, and what is not there."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import itertools
import pickle
import random
import textwrap

import numpy as np
import pytest

import crossent as ce

from .layouts import arrange
from .processes import MIB, linux, python

PEAK = """
    import sys
    import numpy as np
    import crossent as ce

    def reset():
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def read(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    def extra(call):
        # Peak during the call above what was there before it.
        reset()
        before = read("VmRSS")
        result = call()
        peak = read("VmHWM") - before
        del result
        return peak

    # Threads and their stacks first.
    warm = np.ones((1000, 1000), np.float32)
    ce.cross_entropy_with_grad(warm, np.zeros(1000, np.int64), out=np.empty_like(warm))
    ce.softmax(warm, out=np.empty_like(warm))
    MIB = 1 << 20
    N, C = 800, 32000
    x = np.ones((N, C), np.float32)        # 98 MiB
    y = np.arange(N) % C
"""
SLACK = "12 * MIB"


def peak(code):
    assert python(PEAK + textwrap.indent(textwrap.dedent(code), "    ") + '\n    print("good")').stdout.split() == ["good"]


@linux
def test_a_loss_takes_no_memory():
    peak(f"""
        for call in (
            lambda: ce.cross_entropy(x, y),
            lambda: ce.cross_entropy(x, y, label_smoothing=0.1),
            lambda: ce.logsumexp(x),
            lambda: ce.nll_loss(x, y),
        ):
            got = extra(call)
            assert got < {SLACK}, got
    """)


@linux
def test_in_place_takes_no_memory():
    peak(f"""
        for call in (lambda: ce.cross_entropy_with_grad(x, y, out=x), lambda: ce.softmax(x, out=x), lambda: ce.log_softmax(x, out=x)):
            got = extra(call)
            assert got < {SLACK}, got
    """)


@linux
def test_a_gradient_takes_the_memory_of_the_logits():
    peak(f"""
        got = extra(lambda: ce.cross_entropy_with_grad(x, y))
        assert x.nbytes - {SLACK} < got < x.nbytes + {SLACK}, got
    """)


LAYOUTS = (
    *("F", "columns", "NCHW", "reversed", "row-strided", "broadcast", "byte-swapped", "misaligned"),
    *("every second class", "float16"),
)


@linux
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_copied_whole(layout):
    peak(f"""
        layout = {layout!r}
        axis = -1
        if layout == "F":
            x = np.asfortranarray(x)
        elif layout == "columns":
            x, axis = x.reshape(C, N), 0
        elif layout == "NCHW":
            x, axis, y = x.reshape(8, 100, C), 1, np.zeros((8, C), np.int64)
        elif layout == "reversed":
            x = x[::-1, ::-1]
        elif layout == "row-strided":
            x, y = x[::2], y[::2]
        elif layout == "broadcast":
            x = np.broadcast_to(x[:1], (5 * N, C)); y = np.zeros(5 * N, np.int64)
        elif layout == "byte-swapped":
            x = x.astype(x.dtype.newbyteorder())
        elif layout == "misaligned":
            x = np.ones(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(N, C)
        elif layout == "every second class":
            x = x[:, ::2]; y = y % (C // 2)
        elif layout == "float16":
            x = x.astype(np.float16)
        y = y if axis != 0 else np.zeros(N, np.int64)
        calls = [lambda: ce.cross_entropy(x, y, axis=axis), lambda: ce.logsumexp(x, axis)]
        calls += [lambda: ce.score_tokens(x, y, axis=axis, entropy=True), lambda: ce.topk_logprobs(x, 2, axis=axis)]
        calls += [lambda: ce.kl_divergence(x, x, axis=axis)]
        if layout not in ("broadcast", "byte-swapped", "misaligned"):
            calls.append(lambda: ce.cross_entropy_with_grad(x, y, axis=axis, out=x))
        for call in calls:
            got = extra(call)
            assert got < {SLACK}, got
    """)


@linux
@pytest.mark.parametrize("spare", [4, 16, 24, 32, 64, 200])
def test_memory_that_is_not_there_is_an_error(spare):
    """MemoryError, never an abort: whatever the arguments make the library allocate, from row arguments to scratch space."""
    python(f"""
        import resource
        import numpy as np, crossent as ce
        ce.set_num_threads(8)
        rows, labels = np.broadcast_to(np.float32(0), (3_000_000, 4)), np.broadcast_to(np.uint8(1), (3_000_000,))
        wide, x, y = np.broadcast_to(np.float32(0), (1, 10_000_000)), np.ones((30, 20000), np.float32), np.zeros(30, int)
        sparse = ce.SparseProbs(np.zeros((30, 5000), int), np.zeros((30, 5000), np.float32))
        ce.softmax(x)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + ({spare} << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for call in (
            lambda: ce.cross_entropy(wide, [5], label_smoothing=0.1),
            lambda: ce.cross_entropy(wide, [5], label_smoothing=0.1, weight=np.broadcast_to(1.0, 10_000_000)),
            lambda: ce.cross_entropy(rows, labels),
            lambda: ce.cross_entropy(rows, labels, reduction="none"),
            lambda: ce.nll_loss(rows, labels),
            lambda: ce.nll_loss(wide, [5], weight=np.broadcast_to(1.0, 10_000_000)),
            lambda: ce.softmax(rows),
            lambda: ce.logsumexp(rows),
            lambda: ce.log_softmax_vjp(rows, rows),
            lambda: ce.cross_entropy_with_grad(rows, labels),
            lambda: ce.cross_entropy_with_grad(x, y, label_smoothing=0.1),
            lambda: ce.cross_entropy_with_grad(x, sparse),
            lambda: ce.cross_entropy(rows, ce.Mixup(labels, labels, 0.5)),
            lambda: ce.cross_entropy(rows, labels, sample_weight=np.broadcast_to(1.0, labels.shape)),
        ):
            try:
                call()
            except MemoryError:
                pass
    """)


def test_broadcast_arguments_of_any_size():
    """Stride 0 makes arrays that no memory can hold; what is asked of them is refused or takes no time."""
    python(
        """
        import numpy as np, crossent as ce

        def refused(call):
            try:
                call()
            except MemoryError:
                return
            raise AssertionError("no MemoryError")

        rows, labels = np.broadcast_to(np.float32(0), (2**44, 2)), np.broadcast_to(np.uint8(0), (2**44,))
        wide, huge = np.broadcast_to(np.float32(0), (1, 2**45)), np.broadcast_to(np.float32(0), (2**45,))
        refused(lambda: ce.cross_entropy(rows, labels))
        refused(lambda: ce.cross_entropy(rows, ce.Mixup(labels, labels, 0.5)))
        refused(lambda: ce.cross_entropy(rows, rows, sample_weight=np.broadcast_to(np.float32(1), (2**44,))))
        refused(lambda: ce.cross_entropy(rows, rows, reduction="none"))
        refused(lambda: ce.nll_loss(rows, labels))
        refused(lambda: ce.softmax(rows))
        refused(lambda: ce.logsumexp(rows))
        refused(lambda: ce.cross_entropy(wide, [0], weight=huge))
        refused(lambda: ce.cross_entropy(wide, [0], label_smoothing=0.1))
        refused(lambda: ce.nll_loss(wide, [0], weight=huge))
        many = np.broadcast_to(np.uint8(0), (1, 2**44))
        refused(lambda: ce.cross_entropy(np.zeros((1, 2)), ce.SparseProbs(many, np.broadcast_to(np.float32(0), many.shape))))
        # Any number of rows without classes.
        none = np.zeros((2**50, 0), np.float32)
        assert ce.softmax(none).shape == ce.log_softmax(none).shape == ce.softmax_vjp(none, none).shape == none.shape
        assert ce.cross_entropy(none, none) == ce.cross_entropy(none, none, reduction="sum") == 0.0
        refused(lambda: ce.logsumexp(none))
        refused(lambda: ce.cross_entropy(none, none, reduction="none"))
    """,
        timeout=60,
    )


@linux
def test_memory_mapped_logits_are_read_in_place(tmp_path):
    x = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(400, 1000))
    x[:] = np.random.default_rng(3).normal(0, 2, x.shape)
    x.flush()
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "r", shape=x.shape)
    y = np.arange(400)
    assert ce.cross_entropy(mapped, y) == ce.cross_entropy(np.array(x), y)
    loss, grad = ce.cross_entropy_with_grad(mapped, y)
    assert type(grad) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        ce.cross_entropy_with_grad(mapped, y, out=mapped)
    writable = np.memmap(tmp_path / "x.bin", np.float32, "r+", shape=x.shape)
    got_loss, got = ce.cross_entropy_with_grad(writable, y, out=writable)
    assert got is writable
    assert got_loss == loss
    writable.flush()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "x.bin", np.float32).reshape(x.shape), grad)


def test_inputs_are_never_written(dtype):
    rng = np.random.default_rng(4)
    for layout in ("C", "F", "strided", "reversed", "read-only", "misaligned", "byte-swapped", "memory-mapped"):
        x = arrange(rng.normal(0, 3, (300, 257)).astype(dtype), layout)
        y = arrange(rng.integers(0, 257, 300), layout)
        y_some = arrange(np.where(np.arange(300) % 3 == 0, -100, y), layout)
        p = arrange(rng.random(x.shape).astype(np.float32), layout)
        w, g = arrange(rng.random(257), layout), arrange(rng.random(300), layout)
        inputs = (x, y, y_some, p, w, g)
        before = [a.tobytes() for a in inputs]
        for target in (y, y_some, p):
            ce.cross_entropy(x, target, weight=w)
            ce.cross_entropy_with_grad(x, target, weight=w, label_smoothing=0.1, reduction="none", grad_output=g)
        ce.nll_loss_with_grad(x, y, weight=w)
        for f in (ce.softmax, ce.log_softmax, ce.logsumexp):
            f(x)
        ce.softmax_vjp(p, x)
        ce.log_softmax_vjp(x, p)
        assert [a.tobytes() for a in inputs] == before, layout


@pytest.fixture
def _default_cache():
    yield
    ce.clear_cache()
    ce.set_cache_limit(512 * MIB)


@pytest.mark.usefixtures("_default_cache")
def test_living_results_never_share_memory():
    """Arrays that die in any order, and views that outlive them."""
    rng = np.random.default_rng(5)
    order = random.Random(6)
    inputs = [rng.normal(0, 1, (n, 1000)).astype(np.float32) for n in (300, 300, 400, 700, 1100)]
    want = {(k, f): getattr(ce, f)(x).copy() for k, x in enumerate(inputs) for f in ("softmax", "log_softmax")}
    living = []
    for step in range(400):
        key = order.choice(list(want))
        result = getattr(ce, key[1])(inputs[key[0]])
        if step % 3 == 0:
            living.append((key, slice(10, 20), result[10:20]))
        else:
            living.append((key, slice(None), result))
        del result
        order.shuffle(living)
        while len(living) > order.randrange(1, 8):
            living.pop()
        if step % 10 == 0:
            for (_, _, a), (_, _, b) in itertools.combinations(living, 2):
                assert not np.may_share_memory(a, b)
        for key, part, array in living:
            assert np.array_equal(array, want[key][part]), "a living result changed"


@pytest.mark.usefixtures("_default_cache")
def test_memory_is_recycled_and_freed():
    x = np.zeros((1000, 1000), np.float32)
    ce.clear_cache()
    a = ce.softmax(x)
    address = a.ctypes.data
    del a
    b = ce.softmax(x)
    assert b.ctypes.data == address, "the memory of a dead result was not used again"
    c = ce.softmax(x)
    assert c.ctypes.data != address


@pytest.mark.usefixtures("_default_cache")
def test_every_kind_of_view_keeps_the_memory():
    x = np.zeros((1000, 1000), np.float32)
    ce.clear_cache()
    for make in (
        lambda a: a[5],
        memoryview,
        lambda a: a.T,
        lambda a: a.reshape(-1)[:3],
        lambda a: a.view(np.uint8),
        lambda a: np.asarray(a)[::2],
        np.from_dlpack,
        lambda a: a.flat,
    ):
        a = ce.softmax(x)
        address = a.ctypes.data
        keep = make(a)
        del a
        other = ce.softmax(x)
        assert other.ctypes.data != address
        other.fill(7)
        del other, keep
        gc.collect()


@linux
def test_cache_limits():
    peak("""
        def used():
            return read("VmRSS")
        del x
        big = np.ones((200, 32000), np.float32)     # 24 MiB
        ce.clear_cache()
        base = used()
        r = [ce.softmax(big) for _ in range(4)]
        del r
        assert used() - base > 80 * MIB, "nothing was kept"
        ce.set_cache_limit(50 * MIB)
        assert used() - base < 60 * MIB, "a lower limit frees what is above it"
        r = [ce.softmax(big) for _ in range(4)]
        del r
        assert used() - base < 60 * MIB, "more than the limit was kept"
        ce.clear_cache()
        assert used() - base < 12 * MIB, "clear_cache keeps memory"
        ce.set_cache_limit(0)
        r = [ce.softmax(big) for _ in range(4)]
        del r
        assert used() - base < 12 * MIB, "limit 0 keeps memory"
    """)


def test_cache_limit_from_the_environment():
    code = "import crossent as ce; ce.show_config()"
    for value in ("0", "64"):
        result = python(code, env={"CROSSENT_CACHE_MB": value}, args=["-W", "error"])
        assert "CROSSENT_CACHE_MB" in result.stdout
    for bad in ("abc", "-1", "1e400"):
        result = python(code, env={"CROSSENT_CACHE_MB": bad})
        assert "RuntimeWarning" in result.stderr
        assert "CROSSENT_CACHE_MB" in result.stderr


@linux
def test_cache_limit_0_from_the_environment_keeps_nothing():
    code = (
        PEAK
        + """
    base = read("VmRSS")
    r = ce.softmax(x)
    del r
    assert read("VmRSS") - base < 12 * MIB
    print("good")
    """
    )
    assert python(code, env={"CROSSENT_CACHE_MB": "0"}).stdout.split() == ["good"]


def test_results_are_ordinary_arrays():
    for n in (3, 1000):
        x = np.zeros((n, 1000), np.float32)
        y = ce.softmax(x)
        assert type(y) is np.ndarray
        assert y.flags.c_contiguous
        assert y.flags.writeable
        assert y.flags.aligned
        y += 1
        assert pickle.loads(pickle.dumps(y)).tobytes() == y.tobytes()
        fortran = ce.softmax(np.asfortranarray(x))
        np.testing.assert_array_equal(fortran + 1, y)
        for array in (y, fortran, y[1:, ::2], fortran.T):
            array.flags.writeable = False
            assert not array.flags.writeable
            array.flags.writeable = True
            array[0] = 5
        assert y[1:].base is y
        assert y.T[1:].view(np.uint32).base is y
        assert np.asarray(y) is y
        assert memoryview(y).readonly is False
        assert type(y.copy()) is type(copy.deepcopy(y)) is type(pickle.loads(pickle.dumps(y))) is np.ndarray
        assert np.from_dlpack(y).flags.writeable


def test_results_from_many_threads_die_anywhere():
    """Allocated in one thread, freed in others, at once."""
    x = np.random.default_rng(7).normal(0, 1, (400, 1000)).astype(np.float32)
    want = ce.softmax(x).tobytes()

    def body(_):
        arrays = [ce.softmax(x) for _ in range(5)]
        good = all(a.tobytes() == want for a in arrays)
        return good, arrays[::2]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for good, arrays in pool.map(body, range(60)):
            assert good
            assert all(a.tobytes() == want for a in arrays)


@linux
def test_many_calls_do_not_grow():
    code = """
        import gc
        import numpy as np
        import crossent as ce
        def rss():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        x, y = np.zeros((20, 10), np.float32), np.zeros(20, np.int64)
        big, labels = np.zeros((400, 1000), np.float32), np.zeros(400, np.int64)
        def calls(n):
            for k in range(n):
                ce.cross_entropy_with_grad(x, y)
                ce.cross_entropy(x, y, reduction="none")
                with ce.threads(2):
                    ce.softmax(x)
                if k % 100 == 0:
                    ce.cross_entropy_with_grad(big, labels)
                try:
                    ce.cross_entropy(x, y + 10)
                except IndexError:
                    pass
        calls(3000)
        gc.collect()
        before = rss()
        calls(10000)
        gc.collect()
        assert rss() - before < 2000, f"{rss() - before} KiB more"
        print("good")
    """
    assert python(code).stdout.split() == ["good"]
