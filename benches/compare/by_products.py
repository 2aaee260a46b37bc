"""``python benches/compare --by-products``: scores, top-k and KL beside PyTorch and beside our own loss, on shapes of language models."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from timing import Way, clock

import crossent as ce

SHAPES = [(1024, 32000), (512, 128256), (8192, 1000)]
K = 20


def ours(p: Any, q: Any, y: Any) -> dict[str, Callable[[], Any]]:
    place = np.empty_like(q)
    return {
        "loss": lambda: ce.cross_entropy(p, y),
        "score_tokens": lambda: ce.score_tokens(p, y),
        "score_tokens, entropy and rank": lambda: ce.score_tokens(p, y, entropy=True, rank=True),
        f"topk_logprobs, k = {K}": lambda: ce.topk_logprobs(p, K),
        "kl_divergence": lambda: ce.kl_divergence(p, q),
        "kl_divergence_with_grad, into out": lambda: ce.kl_divergence_with_grad(p, q, out=place),
    }


def theirs(p: Any, q: Any, y: Any, threads: int) -> dict[str, Callable[[], Any]]:
    try:
        import torch
        from torch.nn import functional
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    tp, tq, ty = torch.from_numpy(p), torch.from_numpy(q), torch.from_numpy(y)
    leaf = tq.clone().requires_grad_()

    def kl(model: Any) -> Any:
        rows = functional.kl_div(torch.log_softmax(model, -1), torch.log_softmax(tp, -1), reduction="none", log_target=True)
        return rows.sum(-1)

    def kl_grad() -> Any:
        leaf.grad = None
        loss = kl(leaf)
        loss.sum().backward()
        return loss, leaf.grad

    def scores() -> Any:
        lp = torch.log_softmax(tp, -1)
        token = lp.gather(-1, ty[:, None])
        return token, lp.argmax(-1), -(lp.exp() * lp).sum(-1), (lp > token).sum(-1)

    return {
        "loss": lambda: functional.cross_entropy(tp, ty),
        "score_tokens": lambda: functional.cross_entropy(tp, ty, reduction="none"),
        "score_tokens, entropy and rank": scores,
        f"topk_logprobs, k = {K}": lambda: torch.topk(torch.log_softmax(tp, -1), K),
        "kl_divergence": lambda: kl(tq),
        "kl_divergence_with_grad, into out": kl_grad,
    }


def check(mine: dict[str, Callable[[], Any]], peer: dict[str, Callable[[], Any]]) -> None:
    """The answers that are timed agree."""
    if not peer:
        return
    top = f"topk_logprobs, k = {K}"
    np.testing.assert_allclose(mine[top]()[0], peer[top]()[0].numpy(), rtol=1e-4)
    np.testing.assert_allclose(mine["kl_divergence"](), peer["kl_divergence"]().numpy(), rtol=1e-3)
    every = "score_tokens, entropy and rank"
    scores, (token, argmax, entropy, rank) = mine[every](), peer[every]()
    np.testing.assert_allclose(scores.logprob, token[:, 0].numpy(), rtol=1e-4)
    np.testing.assert_allclose(scores.entropy, entropy.numpy(), rtol=1e-4)
    np.testing.assert_array_equal(scores.argmax, argmax.numpy())
    assert np.abs(scores.rank - rank.numpy()).max() <= 1


def ways(p: Any, y: Any, threads: int) -> list[Way]:
    """The same as part of the whole grid; operations that no loss has are called by their own names. Scores come right after a loss."""
    q = np.random.default_rng(2).standard_normal(p.shape, dtype=np.float32) * 3
    mine, peer = ours(p, q, y), theirs(p, q, y, threads)
    check(mine, peer)
    all_ways = []
    for who, calls in (("crossent", mine), ("PyTorch", peer)):
        for op, call in calls.items():
            if op.startswith("score_tokens") and who == "crossent":
                all_ways.append(Way(f"{who} beside {op}", "loss", calls["loss"]))
            if op != "loss":
                all_ways.append(Way(who, op, call))
    return all_ways


def main(threads: int, rounds: int = 9) -> None:
    ce.set_num_threads(threads)
    for rows, classes in SHAPES:
        rng = np.random.default_rng(1)
        p, q = (rng.standard_normal((rows, classes), dtype=np.float32) * 3 for _ in range(2))
        y = rng.integers(0, classes, rows)
        mine, peer = ours(p, q, y), theirs(p, q, y, threads)
        check(mine, peer)
        samples: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for who, ways in (("crossent", mine), ("PyTorch", peer)):
                for op, call in ways.items():
                    samples.setdefault((op, who), []).append(clock(Way(who, op, call), 1))
        median = {key: statistics.median(values) for key, values in samples.items()}
        print(f"\n{rows}x{classes} float32, {threads} threads, medians of {rounds}")
        for op in mine:
            seconds = median[op, "crossent"]
            against = f", PyTorch {median[op, 'PyTorch'] / seconds:5.1f}x" if peer else ""
            print(f"  {op:<36} {seconds * 1e3:8.2f} ms, {seconds / median['loss', 'crossent']:5.2f} of the loss{against}")
