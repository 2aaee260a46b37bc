from contextvars import ContextVar
from typing import Any, SupportsIndex

__all__ = [
    "__version__",
    "bandwidth",
    "check_num_threads",
    "clear_cache",
    "config",
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
    "score_tokens",
    "set_cache_limit",
    "set_num_threads",
    "set_simd_level",
    "simd_level",
    "simd_levels",
    "softmax",
    "softmax_vjp",
    "threads_var",
    "topk_logprobs",
]

__version__: str
threads_var: ContextVar[int | None]

def bandwidth(kind: str, src: object, dst: object, /) -> None: ...
def logsumexp(x: object, axis: object, keepdims: object, out: object, /) -> Any: ...
def softmax(x: object, axis: object, out: object, /) -> Any: ...
def log_softmax(x: object, axis: object, out: object, /) -> Any: ...
def softmax_vjp(grad_output: object, probs: object, axis: object, out: object, /) -> Any: ...
def log_softmax_vjp(grad_output: object, log_probs: object, axis: object, out: object, /) -> Any: ...
def nll_loss(log_probs: object, target: object, axis: object, weight: object, ignore_index: object, reduction: object, /) -> Any: ...
def nll_loss_with_grad(
    log_probs: object,
    target: object,
    axis: object,
    weight: object,
    ignore_index: object,
    reduction: object,
    grad_output: object,
    out: object,
    /,
) -> Any: ...
def cross_entropy(
    logits: object,
    target: object,
    axis: object,
    weight: object,
    ignore_index: object,
    reduction: object,
    label_smoothing: object,
    sample_weight: object,
    normalizer: object,
    z_loss: object,
    softcap: object,
    temperature: object,
    mask: object,
    /,
) -> Any: ...
def cross_entropy_with_grad(
    logits: object,
    target: object,
    axis: object,
    weight: object,
    ignore_index: object,
    reduction: object,
    label_smoothing: object,
    sample_weight: object,
    normalizer: object,
    z_loss: object,
    softcap: object,
    temperature: object,
    mask: object,
    grad_output: object,
    out: object,
    /,
) -> Any: ...
def score_tokens(
    logits: object, tokens: object, axis: object, ignore_index: object, shift: object, entropy: object, rank: object, /
) -> Any: ...
def topk_logprobs(logits: object, k: object, axis: object, /) -> Any: ...
def kl_divergence(p_logits: object, q_logits: object, axis: object, temperature: object, reduction: object, /) -> Any: ...
def kl_divergence_with_grad(
    p_logits: object,
    q_logits: object,
    axis: object,
    temperature: object,
    reduction: object,
    grad_output: object,
    out: object,
    /,
) -> Any: ...
def check_num_threads(n: SupportsIndex, /) -> int: ...
def set_num_threads(n: SupportsIndex, /) -> None: ...
def get_num_threads() -> int: ...
def simd_levels() -> tuple[str, ...]: ...
def simd_level() -> str: ...
def set_simd_level(name: str, /) -> None: ...
def set_cache_limit(n: SupportsIndex, /) -> None: ...
def clear_cache() -> None: ...
def config() -> dict[str, Any]: ...
