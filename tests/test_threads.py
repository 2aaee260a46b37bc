"""The number of threads, and calls from many of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import sys
import threading

import numpy as np
import pytest

import crossent as ce

from .oracle import DTYPES
from .processes import LINUX, linux, python

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


def test_the_first_call_of_a_thread_may_be_a_small_one():
    # What a thread keeps from call to call does not exist yet.
    x, y = np.zeros((1, 10), np.float32), np.array([3])

    def calls():
        return float(ce.cross_entropy(x, y)), ce.cross_entropy_with_grad(x, y)[1][0, 3]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        loss, gradient = pool.submit(calls).result()
    assert loss == pytest.approx(np.log(10), rel=1e-6)
    assert gradient == pytest.approx(-0.9, rel=1e-6)
