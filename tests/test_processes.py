"""Fork and signals."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest

from .processes import linux, python

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
