"""Stable, fast log-softmax, NLL and cross-entropy with gradients over NumPy arrays, on the CPU.

Logits are float16, bfloat16 (ml_dtypes), float32 or float64 arrays of any layout; a *row* is one slice along the class axis. Losses are in
nats.

>>> import numpy as np
>>> import crossent as ce
>>> logits = np.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]], dtype=np.float32)
>>> target = np.array([0, 2])
>>> round(ce.cross_entropy(logits, target), 4)
0.1755
>>> loss, grad = ce.cross_entropy_with_grad(logits, target)
>>> grad.round(3)
array([[-0.107,  0.088,  0.02 ],
       [ 0.025,  0.027, -0.052]], dtype=float32)
"""

from crossent import reference
from crossent._api import (
    cross_entropy,
    cross_entropy_with_grad,
    log_softmax,
    log_softmax_vjp,
    logsumexp,
    nll_loss,
    nll_loss_with_grad,
    softmax,
    softmax_vjp,
)
from crossent._by_products import TokenScores, kl_divergence, kl_divergence_with_grad, score_tokens, topk_logprobs
from crossent._config import (
    clear_cache,
    get_num_threads,
    set_cache_limit,
    set_num_threads,
    set_simd_level,
    show_config,
    simd_level,
    simd_levels,
    threads,
)
from crossent._core import __version__
from crossent._types import Mixup, SparseProbs

__all__ = [
    "Mixup",
    "SparseProbs",
    "TokenScores",
    "__version__",
    "clear_cache",
    "cross_entropy",
    "cross_entropy_with_grad",
    "get_num_threads",
    "kl_divergence",
    "kl_divergence_with_grad",
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "nll_loss",
    "nll_loss_with_grad",
    "reference",
    "score_tokens",
    "set_cache_limit",
    "set_num_threads",
    "set_simd_level",
    "show_config",
    "simd_level",
    "simd_levels",
    "softmax",
    "softmax_vjp",
    "threads",
    "topk_logprobs",
]
