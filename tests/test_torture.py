"""Forks and threads by the dozen, threads that are refused, arguments that change meanwhile, settings without sense, calls without end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import crossent as ce

from .processes import python

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Calls on one row and on arrays that threads share, in every type, and the bits of what they return.
WORK = """
    import contextlib, functools, gc, hashlib, os, random, resource, sys, threading, time
    import ml_dtypes
    import numpy as np
    import crossent as ce

    def calls():
        rng = np.random.default_rng(0)
        for shape, axis in (((1, 10), 1), ((70, 33), 1), ((40, 900), 0), ((7000, 10), 1), ((2, 21, 50, 40), 1), ((3, 22_001), 1)):
            for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
                x, z = rng.normal(0, 3, (2, *shape)).astype(dtype)
                y = rng.integers(0, shape[axis], np.delete(shape, axis))
                p, mask, sample, weight = np.abs(z), z < 3, rng.random(y.shape), rng.random(shape[axis])
                loss = functools.partial(ce.cross_entropy_with_grad, x, axis=axis)
                yield functools.partial(loss, y, weight=weight, sample_weight=sample, label_smoothing=0.1)
                yield functools.partial(loss, p, where=mask, reduction="none", grad_output=sample)
                yield functools.partial(loss, ce.Mixup(y, y[::-1], sample))
                yield functools.partial(loss, ce.SparseProbs(y[..., None], np.ones((*y.shape, 1))))
                yield functools.partial(ce.nll_loss_with_grad, x, y, axis=axis)
                yield functools.partial(ce.score_tokens, x, y, axis=axis, entropy=True, rank=True)
                yield functools.partial(ce.topk_logprobs, x, 5, axis=axis)
                yield functools.partial(ce.kl_divergence_with_grad, x, z, axis=axis)
                yield functools.partial(ce.softmax_vjp, z, ce.softmax(x, axis), axis)

    CALLS = list(calls())

    def bits(call):
        result = call()
        return b"".join(np.asarray(part).tobytes() for part in (result if isinstance(result, tuple) else (result,)))

    def digest():
        return hashlib.sha256(b"".join(map(bits, CALLS))).hexdigest()

    def threads_alive():
        return len(os.listdir("/proc/self/task"))
"""
NAMES = ("CROSSENT_NUM_THREADS", "CROSSENT_SIMD", "CROSSENT_CACHE_MB", "CROSSENT_TUNE")
SHOW = """
    print(ce.show_config("dicts"))
    with ce.threads(1):
        print(digest())
"""


@pytest.fixture(scope="module")
def plain():
    """The settings of an environment that says nothing, and the bits of all calls on the calling thread alone."""
    return python(WORK + SHOW, drop=NAMES).stdout


@pytest.fixture
def digest(plain):
    """The bits alone."""
    return plain.split()[-1]


# --- processes and threads -------------------------------------------------------------------------------------------------------------


@linux
def test_a_forked_pool_computes_what_its_parent_does(digest):
    """Eight children of a process whose threads exist, each with threads of its own."""
    code = """
    import multiprocessing
    ce.set_num_threads(3)
    want = digest()

    def child(_):
        return digest() == want, threads_alive()

    assert threads_alive() >= 3
    with multiprocessing.get_context("fork").Pool(8) as pool:
        results = pool.map(child, range(8), chunksize=1)
    # In each the main thread and two workers, at least.
    assert all(same and threads >= 3 for same, threads in results), results
    print(want)
    """
    assert python(WORK + code).stdout.strip() == digest


def test_sixty_four_threads_at_once(digest):
    """Calls of all sizes, types and functions side by side give the bits that each gives alone."""
    code = """
    import concurrent.futures
    ce.set_num_threads(1)
    want = [bits(call) for call in CALLS]
    print(digest())
    ce.set_num_threads(3)
    barrier = threading.Barrier(64)

    def body(seed):
        order = random.Random(seed).sample(range(len(CALLS)), len(CALLS) // 3)
        barrier.wait()
        return [k for k in order if bits(CALLS[k]) != want[k]]

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        wrong = set().union(*pool.map(body, range(64)))
    assert not wrong, [CALLS[k] for k in wrong]
    """
    assert python(WORK + code).stdout.strip() == digest


@linux
@pytest.mark.parametrize("spare", [0, 1])
def test_threads_that_are_refused(digest, spare):
    """The calling thread does the work when the system gives none of the three helpers, or only one."""
    if spare and os.getuid() != 0:
        pytest.skip("a user who has other processes")
    code = f"""
    ce.set_num_threads(4)
    before, root = threads_alive(), os.getuid() == 0
    try:
        # Root may have any number of threads; a user of whom nobody has heard has ours only.
        root and os.setuid(10_000 + os.getpid() % 50_000)
    except OSError as error:
        sys.exit(print("skip: root cannot become another user:", error))
    resource.setrlimit(resource.RLIMIT_NPROC, (root * before + {spare},) * 2)
    end, started = threading.Event(), 0
    with contextlib.suppress(RuntimeError):
        while started < 10:
            threading.Thread(target=end.wait).start()
            started += 1
    assert started == {spare}, "the limit does not hold, so nothing would be tested"
    end.set()
    print(digest())
    end = time.monotonic() + 20
    while threads_alive() > before:
        assert time.monotonic() < end, "threads of a pool that could not be built stay"
        time.sleep(0.01)
    """
    printed = python(WORK + code).stdout.strip()
    if printed.startswith("skip"):
        pytest.skip(printed[6:])
    assert printed == digest


@linux
def test_one_cpu_gives_the_same_bits(digest):
    """Without helpers, and with more threads than the one CPU can run."""
    pin = "    import os\n    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code = """
    assert ce.get_num_threads() == 1
    alive = threads_alive()
    print(digest())
    assert threads_alive() == alive, "a thread for no CPU"
    for n in (2, 7):
        with ce.threads(n):
            print(digest())
    """
    assert python(pin + WORK + code).stdout.split() == [digest] * 3


@pytest.fixture
def group(request):
    """A control group whose CPU time is limited to a number of microseconds in 100 000, of version 2 or 1."""
    root = Path("/sys/fs/cgroup")
    old, new = root / "cpu" / "cpu.cfs_quota_us", root / "cgroup.subtree_control"
    if new.exists() and "cpu" in new.read_text().split():
        folder, limits = root, {"cpu.max": f"{request.param} 100000"}
    elif old.exists():
        folder, limits = old.parent, {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": f"{request.param}"}
    else:
        pytest.skip("no control groups for CPU time")
    group = folder / f"crossent-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        for name, limit in limits.items():
            (group / name).write_text(limit)
        yield group
    finally:
        group.rmdir()


@linux
@pytest.mark.parametrize(("group", "share"), [(50_000, 1), (100_000, 1), (199_000, 1), (10_000_000, 100)], indirect=["group"])
def test_threads_follow_the_quota_of_the_control_group(group, share):
    """Whole CPUs of the quota, at least one, and no more than there are."""
    if (cpus := len(os.sched_getaffinity(0))) < 2:
        pytest.skip("needs two CPUs, or no quota shows")
    code = f"""
    with open({str(group / "cgroup.procs")!r}, "w") as file:
        file.write("0")
    import crossent as ce
    print(ce.get_num_threads())
    """
    assert python(code).stdout.split() == [str(min(share, cpus))]


EVERYTHING = """
    import queue
    seconds, big = SECONDS, 1 << 20
    ce.set_num_threads(1)
    want = [bits(call) for call in CALLS]
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 3, (3000, 300)).astype("f4"), rng.integers(0, 300, 3000)
    loss, gradient = ce.cross_entropy_with_grad(x, y)
    assert gradient.nbytes > big  # so that its memory is recycled
    moving, labels, level = x[:200].copy(), y[:200].copy(), ce.simd_level()
    results, failures, end = queue.Queue(12), [], time.monotonic() + seconds

    def compute(random):
        k = random.randrange(len(CALLS))
        assert bits(CALLS[k]) == want[k], CALLS[k]

    def make(random):
        with ce.threads(n := random.randrange(1, 5)):
            assert ce.get_num_threads() == n
            result = ce.cross_entropy_with_grad(x, y)
        with contextlib.suppress(queue.Full):
            results.put(result[1][random.randrange(2):], timeout=0.01)
        assert result[0] == loss

    def take(random):
        # Results die here, in a thread that did not make them.
        with contextlib.suppress(queue.Empty):
            result = results.get(timeout=0.01)
            assert result.tobytes() == gradient[-len(result):].tobytes()

    def settings(random):
        ce.set_num_threads(random.randrange(1, 6))
        ce.set_cache_limit(random.choice((0, big, 1 << 24, 1 << 29)))
        random.random() < 0.3 and ce.clear_cache()
        ce.set_simd_level(level)
        config = ce.show_config("dicts")
        assert config["result memory"]["kept"] >= 0 and 1 <= ce.get_num_threads() <= 5, config
        time.sleep(0.001)

    def change(random):
        moving[...] = random.choice((1.0, np.nan, -np.inf, 1e30))
        labels[...] = random.choice((0, 299, 300, -1))

    def read(random):
        for argument, label in ((moving, y[:200]), (moving, labels), (x[:200], labels)):
            try:
                ce.cross_entropy_with_grad(argument, label)
                ce.score_tokens(argument, label, rank=True)
                ce.topk_logprobs(argument, 3)
            except IndexError as error:
                assert label is labels and "is out of bounds for" in str(error), error

    def mistakes(random):
        for wrong in (lambda: ce.cross_entropy(x, y[1:]), lambda: ce.softmax(x, axis=5), lambda: ce.set_num_threads(0)):
            try:
                wrong()
            except ValueError:
                continue
            raise AssertionError("no error")

    def body(what, seed):
        own = random.Random(seed)
        try:
            done = 0
            while not failures and time.monotonic() < end:
                what(own)
                done += 1
            counts[what.__name__] = counts.get(what.__name__, 0) + done
        except BaseException as error:
            failures.append(repr(error))

    counts = {}
    jobs = [compute] * 6 + [make] * 5 + [take] * 3 + [settings] * 2 + [change] * 2 + [read] * 4 + [mistakes] * 2
    threads = [threading.Thread(target=body, args=(what, seed)) for seed, what in enumerate(jobs)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures, failures
    assert len(counts) == 7 and min(counts.values()) > 0, counts
    while not results.empty():
        results.get()
    del gradient
    gc.collect()
    ce.clear_cache()
    assert ce.show_config("dicts")["result memory"]["kept"] == 0
    print(counts)
"""


def test_everything_at_once():
    """Calls, settings, errors, results that die elsewhere and arguments that change, from 24 threads; meant for Pythons without a GIL."""
    seconds = int(os.environ.get("CROSSENT_TORTURE_SECONDS", "4"))
    print(python(WORK + EVERYTHING.replace("SECONDS", str(seconds)), timeout=seconds + 120, args=["-X", "faulthandler"]).stdout)


# --- arguments that change -------------------------------------------------------------------------------------------------------------
# Uses what WORK imports.
MUTATION = """
    import itertools, mmap, signal
    sys.setswitchinterval(1e-4)
    ce.set_num_threads(3)

    def shared(values):
        # A forked child writes to the same memory.
        a = np.frombuffer(mmap.mmap(-1, values.nbytes), values.dtype).reshape(values.shape)
        a[...] = values
        return a

    def write(a, contents, going):
        while going():
            for content in contents:
                a[...] = content

    def cases():
        # name, array that changes, its contents, exceptions that may come of it, calls that read it
        rng = np.random.default_rng(0)
        for (n, c), dtype, label in (((16, 10), "f4", "i8"), ((40, 1000), "f4", "i4"), ((9000, 10), "f8", "u8"), ((2000, 100), "f2", "i8")):
            x = rng.normal(0, 3, (n, c)).astype(dtype)
            good = rng.integers(0, c, n).astype(label)
            p, out, yes = np.abs(x), np.empty_like(x), rng.integers(0, 2, (n, c))
            wrong = [np.array(value).astype(label) for value in (np.iinfo(label).max // 2 + 1, np.iinfo(label).min // 2, c, -1)]
            y, z, q, w, s, g, mask = map(shared, (good, x, p, np.ones(c), np.ones(n), np.ones(n), np.ones((n, c), bool)))
            options = {"weight": np.ones(c), "label_smoothing": 0.1, "out": out}
            yield "labels", y, [good, wrong[0], good[::-1], wrong[1], good, wrong[2], good[::-1], wrong[3]], IndexError, (
                lambda: ce.cross_entropy(x, y),
                lambda: ce.cross_entropy_with_grad(x, y, **options),
                lambda: ce.cross_entropy_with_grad(np.asfortranarray(x), y, softcap=5.0),
                lambda: ce.nll_loss_with_grad(x, y, weight=w, out=out),
                lambda: ce.score_tokens(x, y, entropy=True, rank=True),
                lambda: ce.cross_entropy_with_grad(x, ce.Mixup(y, y[::-1], 0.3), out=out),
                lambda: ce.cross_entropy_with_grad(x, ce.SparseProbs(y[:, None], p[:, :1]), out=out),
            )
            yield "logits", z, [x, np.nan, -np.inf, x[::-1], np.inf, 0], (), (
                lambda: ce.cross_entropy_with_grad(z, good, **options),
                lambda: ce.cross_entropy_with_grad(z, good, out=z),
                lambda: ce.cross_entropy(z.T, good, axis=0),
                lambda: ce.score_tokens(z, good, entropy=True, rank=True),
                lambda: ce.topk_logprobs(z, 7),
                lambda: ce.kl_divergence_with_grad(z, x),
                lambda: ce.softmax_vjp(x, z),
                lambda: ce.log_softmax(z, out=z),
            )
            yield "probabilities", q, [p, np.nan, -1, p[::-1], np.inf], (), (
                lambda: ce.cross_entropy_with_grad(x, q, **options),
                lambda: ce.cross_entropy(x.T, q.T, axis=0),
            )
            for name, argument, contents, refused in (
                ("where", mask, [1, 0, 255, 2, yes], ()),
                ("weight", w, [1, np.nan, 0, 1e308, -1], ()),
                ("sample_weight", s, [1, np.nan, 0, -1, np.inf, yes[:, 0]], ValueError),
                ("grad_output", g, [1, np.nan, 0, -1e308], ()),
            ):
                option = {name: argument, "reduction": "none", "out": out}
                yield name, argument.view("u1") if name == "where" else argument, contents, refused, (
                    lambda: ce.cross_entropy_with_grad(x, good, **option, label_smoothing=0.1),
                    lambda: ce.cross_entropy_with_grad(x, p, **option),
                    lambda: ce.cross_entropy_with_grad(x, ce.SparseProbs(good[:, None], p[:, :1]), **option),
                )

    def run(name, refused, calls):
        # More outcomes than calls: arguments that stayed the same would give one each.
        outcomes, start = set(), time.monotonic()
        for call in itertools.cycle(calls):
            try:
                result = call()
                outcomes.add(hash(np.asarray(result[-1] if isinstance(result, tuple) else result).tobytes()))
            except refused as error:
                assert "is out of bounds for" in str(error) or name in str(error), error
                # Said of the label that was refused, not of what stands there by now: every label below 10 is a class.
                assert refused is not IndexError or not 0 <= int(str(error).split(" = ")[1].split()[0]) < 10, error
                outcomes.add(type(error))
            passed = time.monotonic() - start
            if passed > 0.08 and len(outcomes) > len(calls) and (not refused or refused in outcomes):
                break
            assert passed < 30, f"{name}: no call was met by a change"
"""
MUTATORS = {
    "thread": """
    for name, array, contents, refused, calls in cases():
        stop = threading.Event()
        writer = threading.Thread(target=write, args=(array, contents, lambda: not stop.is_set()), daemon=True)
        writer.start()
        run(name, refused, calls)
        stop.set()
        writer.join()
    """,
    # This one writes even while the interpreter's lock is held, which short calls do not let go.
    "process": """
    parent = os.getpid()
    for name, array, contents, refused, calls in cases():
        writer = os.fork()
        if writer == 0:
            write(array, contents, lambda: os.getppid() == parent)
            os._exit(0)
        run(name, refused, calls)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    """,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("by", MUTATORS)
def test_arguments_that_change_during_the_call(by):
    """Numbers without meaning or the documented exception; never another one, never a crash."""
    python(WORK + MUTATION + MUTATORS[by], args=["-X", "faulthandler"])


# --- settings, and calls without end ---------------------------------------------------------------------------------------------------

GARBAGE = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x80",
    "digits of another script": "٣".encode(),
    "long": b"9" * 100_000,
    "a format": b"%s%n{}\\0",
    "separators": b",=,=threads_from=,=1,group_bytes",
    "2^64": b"18446744073709551616",
}


@pytest.mark.skipif(sys.platform == "win32", reason="environments hold bytes on POSIX only")
@pytest.mark.parametrize("value", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_the_environment(plain, value):
    """Everything is as without it, but for a warning by name; experiments have none."""
    result = python(WORK + SHOW, env=dict.fromkeys(NAMES, value))
    assert result.stdout == plain
    assert [result.stderr.count(f"RuntimeWarning: crossent: the environment variable {name}=") for name in NAMES] == [1, 1, 1, 0]


@pytest.mark.parametrize("value", [0, 1, 2**64 - 1])
def test_settings_without_sense_change_no_bit(digest, value):
    """Whatever number stands in the table of sizes; as many threads and as much memory as a number can say."""
    table = [name for name in ce.show_config("dicts")["tunables"] if name.isidentifier()]
    env = {"CROSSENT_TUNE": ",".join(f"{name}={value}" for name in table)}
    if value > 1:
        env |= {"CROSSENT_NUM_THREADS": str(value), "CROSSENT_CACHE_MB": str(value >> 20)}
    code = f'    assert {{ce.show_config("dicts")["tunables"][name] for name in {table}}} == {{{value}}}\n    print(digest())'
    assert python(WORK + code, env=env, args=["-W", "error"]).stdout.strip() == digest


@linux
def test_a_hundred_thousand_calls_and_ten_thousand_errors_leave_nothing():
    """No page, no object and no reference more than after the first ten thousand of them."""
    code = """
    x, y = np.ones((20, 10), np.float32), np.arange(20) % 10
    s, out, wrong, mixed = np.ones(20), np.empty_like(x), y + 1, ce.Mixup(y, y, 2.0)
    results = [((), call) for call in CALLS[: len(CALLS) // 6]]  # on one row of ten classes
    parts = [part for _, call in results for part in (*call.args, *call.keywords.values())]
    parts += [part for several in parts if isinstance(several, tuple) for part in several]
    held = [part for part in parts if isinstance(part, np.ndarray)] + [x, y, s, out, wrong, mixed, x.dtype, None, "none"]
    errors = (
        (IndexError, lambda: ce.cross_entropy_with_grad(x, wrong, out=out)),
        (ValueError, lambda: ce.cross_entropy(x, y[1:])),
        (ValueError, lambda: ce.cross_entropy_with_grad(x, y, out=out.T)),
        (ValueError, lambda: ce.cross_entropy(x, y, sample_weight=-s)),
        (ValueError, lambda: ce.cross_entropy(x, mixed)),
        (ValueError, lambda: ce.cross_entropy(x, y, reduction="avg")),
        (TypeError, lambda: ce.softmax(y)),
        (TypeError, lambda: ce.cross_entropy(x, y.astype(complex))),
        (TypeError, lambda: ce.kl_divergence(x, None)),
        (TypeError, lambda: ce.cross_entropy(x, y, no_such_option=1)),
        (np.exceptions.AxisError, lambda: ce.logsumexp(x, 2)),
    )

    def run(calls, n):
        for k in range(n):
            error, call = calls[k % len(calls)]
            with contextlib.suppress(error):
                call()
                assert not error, k % len(calls)

    def state():
        gc.collect()
        memory = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        return memory, sys.getallocatedblocks(), np.array([sys.getrefcount(a) for a in held])

    for calls, n in ((results, 100_000), (errors, 10_000)):
        run(calls, 10_000)
        memory, blocks, references = state()
        run(calls, n)
        more, other, now = state()
        assert more - memory < 1 << 18, f"{n} calls: {more - memory} bytes more"
        assert other - blocks < 100, f"{n} calls: {other - blocks} objects more"
        assert abs(now - references).max() < 10, f"{n} calls: references {references} became {now}"
    """
    python(WORK + code)
