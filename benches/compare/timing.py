"""Interleaved rounds: every way is called once per round, so that a busy moment of the machine meets all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cases import Array, Case, WrongAnswerError


@dataclass
class Way:
    """One library's way to one result."""

    who: str
    # loss, grad (loss + gradient in a new array), out, in place, log_softmax (into an array where that is offered), log_softmax new, ...
    op: str
    call: Callable[[], Any]
    # From what `call` returned to (loss, gradient, log_softmax), each None if not computed.
    answer: Callable[[Any], tuple[float | None, Array | None, Array | None]] | None = None
    # Run before every sample, not timed: restores what the call overwrites.
    prepare: Callable[[], Any] | None = None


# Seconds between two libraries.
PAUSE = 0.02


class Timing(float):
    """The median of the rounds, in seconds."""

    rounds: list[float]

    @classmethod
    def of(cls, rounds: list[float]) -> Timing:
        timing = cls(statistics.median(rounds))
        timing.rounds = rounds
        return timing

    @staticmethod
    def ratio(a: float, b: float) -> float:
        """a/b: the median over the rounds that both were in, as one round is one state of the machine."""
        if isinstance(a, Timing) and isinstance(b, Timing):
            return statistics.median(x / y for x, y in zip(a.rounds, b.rounds, strict=False))
        return a / b


# Seconds by (operation, library).
Medians = dict[tuple[str, str], float]


def clock(way: Way, calls: int) -> float:
    """Seconds per call."""
    if way.prepare is not None:
        way.prepare()
    call = way.call
    if calls == 1:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        # Freeing the result is the caller's business, after the clock has stopped.
        del result
        return seconds
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(case: Case, ways: list[Way], budget: float, rounds: int = 25) -> tuple[Medians, dict[tuple[str, str], str]]:
    """Check every way, then time all that passed (and inexact 16-bit peers); at most `budget` seconds but at least 3 rounds."""
    failed: dict[tuple[str, str], str] = {}
    sound = []
    calls: dict[int, int] = {}
    slow: set[int] = set()
    for way in ways:
        try:
            if way.prepare is not None:
                way.prepare()
            result = way.call()
            if way.answer is not None:
                try:
                    case.check(f"{way.who} {way.op}", *way.answer(result))
                except WrongAnswerError as error:
                    # 16-bit means overflow elsewhere: that is worth a line, and the time is worth knowing all the same.
                    if way.who.startswith("crossent") or case.x.dtype.itemsize > 2:
                        raise
                    failed[way.op, way.who] = f"timed although inexact: {error}"
            del result
            once = min(clock(way, 1) for _ in range(2))
        except Exception as error:
            if way.who.startswith("crossent"):
                raise
            failed[way.op, way.who] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        calls[id(way)] = max(1, min(20000, int(2e-3 / once))) if once < 1e-3 else 1
        if once > budget / 20:
            slow.add(id(way))
        sound.append(way)

    samples: dict[tuple[str, str], list[float]] = {(way.op, way.who): [] for way in sound}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        for round_number in range(rounds):
            if round_number >= 3 and time.perf_counter() > end:
                break
            before = ""
            for way in sound:
                library = way.who.split()[0]
                if library != before:
                    # Threads of another library spin for a while in case there is more to do: none is to be measured beside them.
                    time.sleep(PAUSE)
                    if id(way) not in slow:
                        # Not timed: wakes its threads, and the processors.
                        clock(way, 1)
                before = library
                # A way that would eat the whole budget gets three samples; the others go on.
                if round_number < 3 or id(way) not in slow:
                    samples[way.op, way.who].append(clock(way, calls[id(way)]))
    finally:
        gc.enable()
    return {key: Timing.of(values) for key, values in samples.items()}, failed
