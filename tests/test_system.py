"""Settings, names, import and exit."""

from __future__ import annotations

import sysconfig

import pytest

import crossent as ce
from crossent import reference

from .processes import python


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


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="a Python with a GIL")
def test_import_leaves_the_gil_off():
    assert python("import crossent, sys; print(sys._is_gil_enabled())").stdout.split() == ["False"]
