"""Processes, threads, signals, memory and settings."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import itertools
import os
import pickle
import platform
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import crossent as ce
from crossent import reference

from .layouts import arrange
from .oracle import DTYPES, eps

LINUX = sys.platform == "linux"
MIB = 1 << 20
linux = pytest.mark.skipif(not LINUX, reason="reads /proc")


def python(code, *, env=(), drop=(), timeout=120, args=()):
    """Runs a script in a fresh interpreter and returns what it printed; its warnings are errors unless it says otherwise."""
    unset = {"CROSSENT_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "CROSSENT_SIMD", "CROSSENT_CACHE_MB", *drop}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | dict(env)
    result = subprocess.run(
        [sys.executable, *args, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


# --- levels ----------------------------------------------------------------------------------------------------------------------------


@linux
def test_no_level_of_this_machine_is_missing():
    """From the flags that the kernel reports: a level that is silently not found would be a level not tested."""
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.partition(":")[0].strip() in ("flags", "Features"):
            flags = set(line.partition(":")[2].split())
            break
    want = ["scalar"]
    if platform.machine() in ("x86_64", "AMD64"):
        assert flags
        if {"avx2", "fma", "f16c"} <= flags:
            want.insert(0, "avx2")
            if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
                want.insert(0, "avx512")
    elif platform.machine() in ("aarch64", "arm64"):
        want.insert(0, "neon")
    assert ce.simd_levels() == tuple(want)


def test_levels_can_be_set():
    before = ce.simd_level()
    assert before in ce.simd_levels()
    assert ce.simd_levels()[-1] == "scalar"
    try:
        for name in ce.simd_levels():
            ce.set_simd_level(name)
            assert ce.simd_level() == name
    finally:
        ce.set_simd_level(before)


def test_levels_differ_in_their_last_bits_only():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (200, 1000)).astype(np.float32)
    before = ce.simd_level()
    results = {}
    try:
        for name in ce.simd_levels():
            ce.set_simd_level(name)
            results[name] = ce.softmax(x)
    finally:
        ce.set_simd_level(before)
    for a, b in itertools.combinations(results.values(), 2):
        np.testing.assert_allclose(a, b, rtol=20 * eps(x.dtype))


@pytest.mark.parametrize("name", ce.simd_levels())
def test_level_from_the_environment(name):
    code = "import crossent as ce; print(ce.simd_level())"
    assert python(code, env={"CROSSENT_SIMD": name}, args=["-W", "error"]).stdout.split() == [name]


def test_bad_level_in_the_environment():
    code = "import crossent as ce; print(ce.simd_level(), ce.simd_levels()[0])"
    for bad in ("avx1024", "AVX-2"):
        result = python(code, env={"CROSSENT_SIMD": bad})
        got, best = result.stdout.split()
        assert got == best
        assert "RuntimeWarning" in result.stderr
        assert "CROSSENT_SIMD" in result.stderr
        assert bad in result.stderr


# --- number of threads -----------------------------------------------------------------------------------------------------------------

SHOW_THREADS = "import crossent as ce; print(ce.get_num_threads())"


def shown(env, **kwargs):
    result = python(SHOW_THREADS, env=env, **kwargs)
    return int(result.stdout), result.stderr


def test_threads_from_the_environment():
    both = {"CROSSENT_NUM_THREADS": "3", "RAYON_NUM_THREADS": "4", "OMP_NUM_THREADS": "5"}
    assert shown(both) == (3, "")
    del both["CROSSENT_NUM_THREADS"]
    assert shown(both) == (4, "")
    del both["RAYON_NUM_THREADS"]
    assert shown(both) == (5, "")
    # OpenMP's own form: one number per nesting level.
    assert shown({"OMP_NUM_THREADS": "6,2"}) == (6, "")


@pytest.mark.parametrize("name", ["CROSSENT_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("bad", ["abc", "0", "-1", "1.5", "99999999999999999999999"])
def test_bad_threads_in_the_environment(name, bad):
    """Skipped with a warning that names the variable; the next one counts."""
    env = {"OMP_NUM_THREADS": "7", name: bad}
    number, errors = shown(env)
    if name != "OMP_NUM_THREADS":
        assert number == 7
    else:
        assert number >= 1
    assert "RuntimeWarning" in errors
    assert name in errors
    assert bad in errors
    # As an error it is an exception, not an abort.
    code = "import warnings; warnings.simplefilter('error')\ntry:\n import crossent\nexcept RuntimeWarning as w: print('raised', w)"
    assert name in python(code, env=env).stdout


@linux
def test_threads_follow_the_cpus_of_the_process():
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import crossent as ce
        print(ce.get_num_threads())
    """
    assert python(code).stdout.split() == ["1"]
    number, _ = shown({})
    assert 1 <= number <= len(os.sched_getaffinity(0))


def test_set_num_threads_and_threads():
    code = """
        import crossent as ce
        assert ce.get_num_threads() == 3
        ce.set_num_threads(4)
        assert ce.get_num_threads() == 4
        with ce.threads(2):
            assert ce.get_num_threads() == 2
            with ce.threads(6):
                assert ce.get_num_threads() == 6
            ce.set_num_threads(5)
            assert ce.get_num_threads() == 2
        assert ce.get_num_threads() == 5
        try:
            with ce.threads(1):
                raise KeyError
        except KeyError:
            pass
        assert ce.get_num_threads() == 5
        print("good")
    """
    assert python(code, env={"CROSSENT_NUM_THREADS": "3"}).stdout.split() == ["good"]


def test_threads_is_local_to_its_context():
    before = ce.get_num_threads()
    seen = []
    with ce.threads(before + 3):
        thread = threading.Thread(target=lambda: seen.append(ce.get_num_threads()))
        thread.start()
        thread.join()
        assert ce.get_num_threads() == before + 3
    # A new thread starts with an empty context, except where Python hands its own on (free-threaded builds).
    assert seen[0] in ([before] if not getattr(sys.flags, "thread_inherit_context", 0) else [before + 3])

    async def task(n):
        with ce.threads(n):
            await asyncio.sleep(0.01)
            return ce.get_num_threads()

    async def tasks():
        return await asyncio.gather(*(task(n) for n in (1, 2, 3, 4)))

    assert asyncio.run(tasks()) == [1, 2, 3, 4]
    assert ce.get_num_threads() == before


def test_one_manager_in_many_contexts():
    """What a block puts back is what its own context had, whoever else uses the manager meanwhile."""
    shared = ce.threads(2)

    async def task(before, first, second):
        with ce.threads(before):
            await asyncio.sleep(first)
            with shared:
                await asyncio.sleep(second)
                inside = ce.get_num_threads()
                with shared:
                    await asyncio.sleep(0)
            return inside, ce.get_num_threads()

    async def tasks():
        return await asyncio.gather(task(5, 0.0, 0.02), task(6, 0.01, 0.03), task(7, 0.01, 0.0))

    assert asyncio.run(tasks()) == [(2, 5), (2, 6), (2, 7)]

    barrier, seen = threading.Barrier(2), []

    def thread(before):
        with ce.threads(before):
            barrier.wait()
            with shared:
                barrier.wait()
            barrier.wait()
            seen.append((before, ce.get_num_threads()))

    threads = [threading.Thread(target=thread, args=(n,)) for n in (8, 9)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(seen) == [(8, 8), (9, 9)]

    @shared
    def decorated(depth):
        return decorated(depth - 1) if depth else ce.get_num_threads()

    with ce.threads(4):
        assert decorated(3) == 2
        assert ce.get_num_threads() == 4


def test_more_threads_than_rows_or_cpus():
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (3, 100_000)).astype(np.float32)
    want = ce.softmax(x)
    for n in (7, 64, 100_000):
        with ce.threads(n):
            np.testing.assert_array_equal(ce.softmax(x), want)


@linux
def test_no_thread_starts_at_import_or_for_small_inputs():
    code = """
        import os
        import numpy as np
        count = lambda: len(os.listdir("/proc/self/task"))
        before = count()
        import crossent as ce
        assert count() == before, "import started a thread"
        ce.set_num_threads(3)
        ce.cross_entropy_with_grad(np.zeros((10, 10), np.float32), [0] * 10)
        assert count() == before, "a small call started a thread"
        with ce.threads(1):
            ce.softmax(np.zeros((2000, 2000), np.float32))
        assert count() == before, "a call with one thread started another"
        ce.softmax(np.zeros((2000, 2000), np.float32))
        assert count() - before == 2, f"{count() - before} threads beside the calling one"
        print("good")
    """
    assert python(code).stdout.split() == ["good"]


# --- many Python threads ---------------------------------------------------------------------------------------------------------------


def jobs():
    rng = np.random.default_rng(2)
    shapes = [((1, 10), 1), ((33, 7), 1), ((700, 300), 1), ((4, 6, 50, 40), 1), ((3, 70_000), 1), ((20_000, 10), 1), ((300, 500), 0)]
    for number, (shape, axis) in enumerate(shapes):
        for dtype in DTYPES:
            x = rng.normal(0, 3, shape).astype(dtype)
            y = rng.integers(0, shape[axis], np.delete(shape, axis))
            options = {"axis": axis, "label_smoothing": 0.1 * (number % 2)}
            yield x, y, options


def test_sixteen_threads_at_once():
    work = list(jobs())
    want = [ce.cross_entropy_with_grad(x, y, **options) for x, y, options in work]
    barrier = threading.Barrier(16)
    failures = []

    def body(seed):
        order = list(range(len(work))) * 3
        random.Random(seed).shuffle(order)
        barrier.wait()
        for k in order:
            x, y, options = work[k]
            with ce.threads(1 + (seed + k) % 4):
                loss, grad = ce.cross_entropy_with_grad(x, y, **options)
            if loss != want[k][0] or grad.tobytes() != want[k][1].tobytes():
                failures.append(k)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(body, seed) for seed in range(16)]:
            future.result(timeout=120)
    assert not failures


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if LINUX else False, reason="needs two CPUs")
def test_the_interpreter_runs_while_a_call_computes():
    """The GIL is released: a Python loop in another thread goes on during one long call."""
    x = np.zeros((3000, 5000), np.float16)
    y = np.zeros(3000, np.int64)
    before, ticks, running = ce.simd_level(), [0], [True]

    def tick():
        while running[0]:
            ticks[0] += 1

    ce.set_simd_level("scalar")
    thread = threading.Thread(target=tick)
    switch = sys.getswitchinterval()
    try:
        # So long that the ticking thread gets nothing by the interpreter's own switching; both threads wait for it once.
        sys.setswitchinterval(2)
        thread.start()
        start = ticks[0]
        with ce.threads(1):
            ce.cross_entropy(x, y)
        assert ticks[0] - start > 1000
    finally:
        running[0] = False
        sys.setswitchinterval(switch)
        thread.join()
        ce.set_simd_level(before)


# --- fork ------------------------------------------------------------------------------------------------------------------------------

FORK = """
    import os, sys, time, warnings
    import numpy as np
    import crossent as ce
    warnings.simplefilter("ignore")
    ce.set_num_threads(3)
    x = np.random.default_rng(0).normal(0, 3, (2000, 1000)).astype(np.float32)
    y = np.arange(2000) % 1000
    def work():
        loss, grad = ce.cross_entropy_with_grad(x, y)
        return loss, grad.tobytes()

    def wait(pid):
        for _ in range(600):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(pid, 9)
        return "hangs"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_threads():
    code = (
        FORK
        + """
    want = work()
    kept = ce.softmax(x)
    del kept                      # a recycled buffer on both sides of the fork
    for generation in range(3):
        pid = os.fork()
        if pid == 0:
            good = work() == want
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if work() == want else 1)
            os._exit(0 if good and wait(grandchild) == 0 and work() == want else 1)
        assert work() == want
        assert wait(pid) == 0, "child"
    print("good")
    """
    )
    assert python(code).stdout.split() == ["good"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_before_threads():
    code = (
        FORK
        + """
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    work()
    assert wait(pid) == 0
    print("good")
    """
    )
    assert python(code).stdout.split() == ["good"]


@linux
def test_a_forked_child_has_threads_of_its_own():
    """Full speed: the child's pool is built, not replaced by the calling thread."""
    code = (
        FORK
        + """
    count = lambda: len(os.listdir("/proc/self/task"))
    work()
    pid = os.fork()
    if pid == 0:
        before = count()
        work()
        os._exit(0 if count() == before + 2 else 1)
    assert wait(pid) == 0
    print("good")
    """
    )
    assert python(code).stdout.split() == ["good"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_does_not_share_recycled_memory():
    """Parent and child write into what they get; neither sees the other's."""
    code = (
        FORK
        + """
    a = ce.softmax(x)
    bits = a.tobytes()
    b = ce.softmax(x)
    del b
    pid = os.fork()
    if pid == 0:
        for _ in range(20):
            c = ce.log_softmax(x)
            c.fill(7)
        os._exit(0 if a.tobytes() == bits else 1)
    c = ce.softmax(x)
    for _ in range(20):
        d = ce.log_softmax(x)
        d.fill(3)
    assert wait(pid) == 0
    assert c.tobytes() == bits and a.tobytes() == bits
    print("good")
    """
    )
    assert python(code).stdout.split() == ["good"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_another_thread_computes():
    code = (
        FORK
        + """
    import threading
    want = work()
    stop = []
    def loop():
        while not stop:
            assert work() == want
    threads = [threading.Thread(target=loop) for _ in range(2)]
    for t in threads: t.start()
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if work() == want else 1)
        assert wait(pid) == 0
    stop.append(1)
    for t in threads: t.join()
    print("good")
    """
    )
    assert python(code).stdout.split() == ["good"]


# --- signals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_keyboard_interrupt_during_calls():
    code = """
        import signal, sys, time
        import numpy as np
        import crossent as ce
        # A shell's background job would ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ce.set_simd_level("scalar")
        x = np.zeros((4000, 5000), np.float16)
        y = np.zeros(4000, np.int64)
        want = ce.cross_entropy(x, y)
        print("ready", flush=True)
        calls = 0
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                ce.cross_entropy(x, y)
                calls += 1
        except KeyboardInterrupt:
            assert ce.cross_entropy(x, y) == want
            print("interrupted", flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(0.2)
        process.send_signal(2)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert out == "interrupted\n"
    assert process.returncode == 0


# --- memory ----------------------------------------------------------------------------------------------------------------------------

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
        ce.set_num_threads(2)
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


# --- the rest --------------------------------------------------------------------------------------------------------------------------


def test_show_config(capsys):
    with ce.threads(3):
        assert ce.show_config() is None
    text = capsys.readouterr().out
    for part in (ce.__version__, ce.simd_level(), *ce.simd_levels(), "3", "threads()"):
        assert part in text
    for word in ("simd", "threads", "tunables", "build"):
        assert word in text.lower()


def test_config_says_where_the_threads_come_from():
    code = "import crossent as ce; ce.show_config()"
    assert "RAYON_NUM_THREADS" in python(code, env={"RAYON_NUM_THREADS": "2"}).stdout
    assert "set_num_threads" in python("import crossent as ce; ce.set_num_threads(2); ce.show_config()").stdout


def test_public_names():
    for name in ce.__all__:
        assert hasattr(ce, name)
    contract = (
        "logsumexp softmax log_softmax softmax_vjp log_softmax_vjp nll_loss nll_loss_with_grad cross_entropy cross_entropy_with_grad "
        "score_tokens topk_logprobs kl_divergence kl_divergence_with_grad "
        "set_num_threads get_num_threads threads simd_levels simd_level set_simd_level set_cache_limit clear_cache show_config reference"
    )
    assert set(contract.split()) <= set(dir(ce))
    assert ce.reference is reference


def test_import_needs_numpy_only():
    code = """
        import sys
        import crossent as ce
        import numpy as np
        ce.cross_entropy_with_grad(np.zeros((3, 4), np.float16), [0, 1, 2])
        outside = {name.partition(".")[0] for name in sys.modules} & {"torch", "scipy", "ml_dtypes", "jax", "pandas", "numba"}
        assert not outside, outside
        print("good")
    """
    assert python(code).stdout.split() == ["good"]


def test_daemon_threads_at_exit():
    """Leaving while another thread computes ends the process, without a crash."""
    code = """
        import threading
        import numpy as np
        import crossent as ce
        x = np.zeros((2000, 1000), np.float32)
        def loop():
            while True:
                ce.softmax(x)
        for _ in range(3):
            threading.Thread(target=loop, daemon=True).start()
        threading.Event().wait(0.3)
        print("good", flush=True)
    """
    assert python(code).stdout.split() == ["good"]
