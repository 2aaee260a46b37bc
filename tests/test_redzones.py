"""No byte outside of an array is written, none beside its memory read: borders around outputs, arrays at the edge of forbidden pages."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import crossent as ce

from .layouts import OUTPUTS, arrange
from .levels import each_level
from .oracle import DTYPES, row_dtype
from .processes import python

# Every length around the vectors, and both sides of where tiles, blocks and groups end.
SHORT = tuple(range(1, 71))
EDGES = (127, 128, 129, 257, 511, 512, 513, 1024, 1025, 2049)
LARGE = (1000, 4099, 32000)
ROWS = (1, 2, 3, 4, 5, 17)


def cap(a):
    """A softcap for few classes only: its tanh takes time."""
    return 9.0 if a.x.shape[1] < 20 else None


# What reads only: calls on operands `a` along the axis 1.
READS = (
    lambda a: ce.cross_entropy(a.x, a.y, reduction="none", axis=1),
    lambda a: ce.cross_entropy(a.x, a.y, weight=a.weight, sample_weight=a.sample, label_smoothing=0.1, axis=1),
    lambda a: ce.cross_entropy(a.x, a.p, where=a.mask, axis=1),
    lambda a: ce.cross_entropy(a.x, ce.Mixup(a.y, a.y, a.share), axis=1),
    lambda a: ce.cross_entropy(a.x, ce.SparseProbs(a.y[..., None], a.p[:, :1]), axis=1),
    lambda a: ce.nll_loss(a.x, a.y, weight=a.weight, axis=1),
    lambda a: ce.score_tokens(a.x, a.y, entropy=True, rank=True, axis=1),
    lambda a: ce.topk_logprobs(a.x, min(5, a.x.shape[1]), axis=1),
    lambda a: ce.kl_divergence(a.z, a.x, axis=1),
)
# What writes to `out`: whether that may be the logits `x`, or has an entry per row.
WRITES = (
    (lambda a, **o: ce.cross_entropy_with_grad(a.x, a.y, axis=1, **o)[1], "x"),
    (lambda a, **o: ce.cross_entropy_with_grad(a.x, a.y, weight=a.weight, label_smoothing=0.1, axis=1, **o)[1], "x"),
    (lambda a, **o: ce.cross_entropy_with_grad(a.x, a.p, reduction="none", grad_output=a.sample, axis=1, **o)[1], "x"),
    (lambda a, **o: ce.cross_entropy_with_grad(a.x, a.y, where=a.mask, sample_weight=a.sample, softcap=cap(a), axis=1, **o)[1], "x"),
    (lambda a, **o: ce.nll_loss_with_grad(a.x, a.y, weight=a.weight, axis=1, **o)[1], "x"),
    (lambda a, **o: ce.kl_divergence_with_grad(a.z, a.x, axis=1, **o)[1], "x"),
    (lambda a, **o: ce.softmax(a.x, 1, **o), "x"),
    (lambda a, **o: ce.log_softmax(a.x, 1, **o), "x"),
    (lambda a, **o: ce.softmax_vjp(a.z, a.p, 1, **o), None),
    (lambda a, **o: ce.log_softmax_vjp(a.z, a.x, 1, **o), None),
    (lambda a, **o: ce.logsumexp(a.x, 1, **o), "rows"),
)


def operands(shape, dtype):
    """Logits, other logits, probabilities, labels and what else comes per entry, per row and per class."""
    rng = np.random.default_rng(shape)
    rows = (shape[0], *shape[2:])
    x, z = rng.normal(0, 3, (2, *shape)).astype(dtype)
    y = rng.integers(0, shape[1], rows).astype(rng.choice(["i8", "i4", "u1" if shape[1] < 256 else "u2"]))
    return {
        "x": x,
        "z": z,
        "p": np.abs(z),
        "y": y,
        "mask": rng.random(shape) < 0.8,
        "weight": rng.random(shape[1]).astype(dtype),
        "sample": rng.random(rows),
        "share": rng.random(rows).astype(np.float32),
    }


class Place:
    """How an array of a layout lies in flat memory."""

    def __init__(self, shape, dtype, layout):
        self.shape, self.dtype = shape, dtype
        self.strides = arrange(np.zeros(shape, dtype), layout).strides
        reach = [(n - 1) * step for n, step in zip(shape, self.strides, strict=True)]
        self.before = -sum(r for r in reach if r < 0)
        self.size = self.before + sum(r for r in reach if r > 0) + dtype.itemsize

    def at(self, memory, start, dtype=None):
        """The array whose lowest byte is `memory[start]`."""
        return np.ndarray(self.shape, dtype or self.dtype, memory, start + self.before, self.strides)


place_of = functools.cache(Place)


def bits(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [np.asarray(part).tobytes() for part in parts]


# --- borders ---------------------------------------------------------------------------------------------------------------------------

BORDER = 256  # further than any vector reaches, and a multiple of every alignment
PATTERN = (np.arange(1 << 23) * 37 % 251).astype(np.uint8)


class Bordered:
    """An array in memory full of a pattern, which has to stand before, after and between its elements whatever is written to them."""

    def __init__(self, shape, dtype, layout):
        place = place_of(shape, dtype, layout)
        size = place.size + 2 * BORDER
        self.pattern = PATTERN[:size]
        self.memory = self.pattern.copy()
        self.array = place.at(self.memory, BORDER)
        self.outside = np.ones(size, bool)
        place.at(self.outside, BORDER, f"V{dtype.itemsize}")[...] = b""

    def take(self):
        """What was written, after a look at the border; the memory is as at first then."""
        result = self.array.tobytes()
        broken = np.flatnonzero((self.memory != self.pattern) & self.outside)
        assert not broken.size, f"bytes {broken - BORDER} are not those of {self.array.shape} with strides {self.array.strides}"
        self.memory[...] = self.pattern
        return result


def test_a_border_notices_one_byte():
    for layout, at in (("C", -1), ("C", 24), ("strided", 4), ("reversed", 24), ("padded rows", 12), ("F", BORDER + 23)):
        border = Bordered((2, 3), np.dtype(np.float32), layout)
        border.array[...] = 1
        assert np.frombuffer(border.take(), np.float32).tolist() == [1] * 6
        border.memory[BORDER + at] += 1
        with pytest.raises(AssertionError, match=rf"bytes \[{at}\]"):
            border.take()


@pytest.mark.parametrize("layout", [layout for layout in OUTPUTS if layout != "memory-mapped"])
def test_borders_of_outputs_stay(dtype, layout, rng):
    """Of every function with `out`, which may be the logits; all its elements are written, as if there were no border."""
    for classes in (*SHORT, *EDGES):
        rows = int(rng.choice(ROWS if classes in EDGES else (*ROWS, 33, 64, 65, 130)))
        for shape in ((rows, classes), (2, classes, min(rows, 17))):
            # Logits of another layout than the gradient's may be rounded otherwise in their last bits, so those are not replaced.
            of_inputs = layout if rng.random() < 0.6 else "C"
            given = {name: arrange(a, of_inputs) for name, a in operands(shape, dtype).items()}
            a, b = SimpleNamespace(**given), SimpleNamespace(**given)
            out, rows_out = Bordered(shape, dtype, layout), Bordered(a.y.shape, row_dtype(dtype), layout)
            b.x = out.array
            for level in each_level():
                for call, kind in WRITES:
                    border = rows_out if kind == "rows" else out
                    want = call(a).tobytes()
                    call(a, out=border.array)
                    assert border.take() == want, level
                    if kind == "x" and of_inputs == layout:
                        b.x[...] = a.x
                        call(b, out=b.x)
                        assert border.take() == want, level


# --- forbidden pages -------------------------------------------------------------------------------------------------------------------


class Guarded:
    """Memory between two pages that end the process when they are touched."""

    def __init__(self, size):
        page = mmap.PAGESIZE
        whole = mmap.mmap(-1, -(-size // page) * page + 2 * page)
        first = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        for edge in (first, first + len(whole) - page):
            # 0: neither read nor written.
            if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.first, self.memory = first + page, np.frombuffer(whole, np.uint8)[page:-page]

    def hold(self, values, layout, end, gap=0):
        """The values at the beginning or end of the memory, but for a gap of some bytes."""
        place = place_of(values.shape, values.dtype, layout)
        array = place.at(self.memory, len(self.memory) - place.size - gap if end else gap)
        array[...] = values
        return array


# What large results do: stores past the caches, exponentials computed twice.
PAST_THE_CACHES = "stream_from=1,stream_columns_from=1,ask_from=1,recompute=2"


def apart(function, *args, **options):
    """Calls a function of this file in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import {__name__} as file; file.{function}(*{args})"
    return python(code, args=["-X", "faulthandler"], **options)


def touch(distance):
    """Reads one byte at a distance from an end of guarded memory."""
    memory = Guarded(100)
    start = memory.first if distance < 0 else memory.first + len(memory.memory) - 1
    print(ctypes.string_at(start + distance, 1))


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect")
def test_forbidden_pages_end_the_process():
    assert apart("touch", 0).stdout
    for distance in (-1, 1):
        with pytest.raises(AssertionError, match="exit -"):
            apart("touch", distance)


def at_the_edge(progress, rows_of_cases):
    """All calls on arrays at both ends of guarded memory; the same bits come out at either. Runs in a process of its own."""
    memory = {name: Guarded(1 << 21) for name in (*operands((1, 1), DTYPES[0]), "out", "rows")}
    with Path(progress).open("wb", buffering=0) as file:
        for dtype, (classes, rows, layout) in itertools.product(DTYPES, edge_cases(rows_of_cases)):
            values = operands((rows, classes), dtype)
            gap, of_outputs = (1, "C") if layout == "misaligned" else (0, layout)
            results = []
            for end in (False, True):
                file.seek(0)
                file.write(f"{dtype} {rows} x {classes} {layout} {'end' if end else 'beginning'}".ljust(80).encode())
                a = SimpleNamespace(**{name: memory[name].hold(value, layout, end, gap) for name, value in values.items()})
                out = memory["out"].hold(values["x"], of_outputs, end)
                rows_out = memory["rows"].hold(np.zeros(rows, row_dtype(dtype)), of_outputs, end)
                for _ in each_level():
                    results += [bits(call(a)) for call in READS]
                    for call, kind in WRITES:
                        results.append(bits(call(a, out=rows_out if kind == "rows" else out)))
                        if kind == "x" and not gap:
                            results.append(bits(call(a, out=a.x)))
                            a.x[...] = values["x"]
            half = len(results) // 2
            assert results[:half] == results[half:], "the bits at the beginning are others"


def edge_cases(rows):
    """Classes, rows, layout."""
    for classes in SHORT:
        yield from itertools.product([classes], rows, ["C", "F"])
        yield from itertools.product([classes], [rows[classes % len(rows)]], ["padded rows", "strided", "reversed", "misaligned"])
    yield from (case for case in itertools.product(LARGE, rows, ["C", "F"]) if case[0] * case[1] < 70_000)


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect")
@pytest.mark.parametrize(("tune", "rows"), [("", ROWS), (PAST_THE_CACHES, (1, 4, 17))], ids=["usual", "past the caches"])
def test_nothing_beside_an_array_is_touched(tune, rows, tmp_path):
    """A process that reads or writes there would die."""
    progress = tmp_path / "progress"
    try:
        apart("at_the_edge", str(progress), rows, env={"CROSSENT_TUNE": tune})
    except AssertionError as error:
        raise AssertionError(f"{progress.read_text().strip()}: {error}") from None
