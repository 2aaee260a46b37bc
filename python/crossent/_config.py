"""Threads, instruction sets, result memory, and what holds now."""

from __future__ import annotations

from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, overload

from crossent import _core

if TYPE_CHECKING:
    from types import TracebackType
    from typing import SupportsIndex

    from typing_extensions import Self


def set_num_threads(n: SupportsIndex, /) -> None:
    """Set the number of threads for the whole process.

    Results do not depend on it: they have the same bits for every number of threads. Small inputs run on the calling thread in any case.

    Parameters
    ----------
    n : int
        1 or more. `threads` overrules it in its context.

    Raises
    ------
    ValueError
        If `n` is less than 1.

    See Also
    --------
    threads : the same for a block of code.
    show_config : shows the number and who set it.

    Examples
    --------
    >>> ce.set_num_threads(2)
    >>> ce.get_num_threads()
    2
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """Return the number of threads that a large call made here would use.

    The first of these that is set counts: `threads`, `set_num_threads`, the environment variables ``CROSSENT_NUM_THREADS``,
    ``RAYON_NUM_THREADS`` and ``OMP_NUM_THREADS`` (as they were at import), the CPUs this process may use (affinity and cgroup quota).

    Returns
    -------
    int

    Examples
    --------
    >>> with ce.threads(3):
    ...     ce.get_num_threads()
    3
    """
    return _core.get_num_threads()


# What the `threads` blocks of this context will put back, innermost last: not in the managers, which threads and tasks may share.
_before: ContextVar[tuple[int | None, ...]] = ContextVar("crossent.threads.before", default=())


class threads(ContextDecorator):  # noqa: N801  (a context manager that reads like a function, as numpy.errstate does)
    """Context manager (and decorator) that sets the number of threads, for this context only.

    Like `numpy.errstate` it is local to the thread or asyncio task.

    Parameters
    ----------
    n : int
        1 or more.

    Raises
    ------
    ValueError
        If `n` is less than 1.

    Examples
    --------
    >>> with ce.threads(1):
    ...     ce.get_num_threads()
    1
    """

    def __init__(self, n: SupportsIndex, /) -> None:
        self._n = _core.check_num_threads(n)

    def __enter__(self) -> Self:
        _before.set((*_before.get(), _core.threads_var.get()))
        _core.threads_var.set(self._n)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        *outer, before = _before.get()
        _before.set(tuple(outer))
        _core.threads_var.set(before)

    def __repr__(self) -> str:
        return f"crossent.threads({self._n})"


def simd_levels() -> tuple[str, ...]:
    """Return the names of the instruction-set levels that this machine can run, best first.

    Returns
    -------
    tuple of str
        Some of ``"avx512"``, ``"avx2"``, ``"neon"``, and always ``"scalar"``.

    Examples
    --------
    >>> ce.simd_levels()[-1]
    'scalar'
    """
    return _core.simd_levels()


def simd_level() -> str:
    """Return the name of the instruction-set level in use.

    Returns
    -------
    str

    Examples
    --------
    >>> ce.simd_level() in ce.simd_levels()
    True
    """
    return _core.simd_level()


def set_simd_level(name: str, /) -> None:
    """Choose the instruction-set level for the whole process; ``CROSSENT_SIMD=name`` in the environment does it at import.

    Every level keeps the stated accuracy, but results may differ in the last bits from level to level.

    Parameters
    ----------
    name : str
        One of `simd_levels`.

    Raises
    ------
    ValueError
        If this machine cannot run it.

    Examples
    --------
    >>> ce.set_simd_level("scalar")
    >>> ce.simd_level()
    'scalar'
    >>> ce.set_simd_level(ce.simd_levels()[0])
    """
    _core.set_simd_level(name)


def set_cache_limit(n: SupportsIndex, /) -> None:
    """Set how many bytes of dead large results are kept for the next ones, and free what is above.

    Touching fresh memory for the first time costs more than computing on it. When an array that this library returned (1 MiB or more) dies,
    its memory is therefore kept for the next result of about its size. It is never shared with a living array.

    Parameters
    ----------
    n : int
        Bytes, 0 to keep nothing. The default is 512 MiB, or ``CROSSENT_CACHE_MB`` (in MiB) from the environment.

    Raises
    ------
    ValueError
        If `n` is negative.

    See Also
    --------
    clear_cache : frees what is kept now.

    Examples
    --------
    >>> ce.set_cache_limit(64 * 2**20)
    """
    _core.set_cache_limit(n)


def clear_cache() -> None:
    """Free the memory that is kept for later results.

    Examples
    --------
    >>> ce.clear_cache()
    """
    _core.clear_cache()


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Show version, instruction-set level, threads and where each came from, tunables, and the build.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it.

    Returns
    -------
    dict or None

    Examples
    --------
    >>> sorted(ce.show_config(mode="dicts"))
    ['build', 'result memory', 'simd', 'threads', 'tunables', 'version']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    config = _core.config()
    if mode == "dicts":
        return config
    lines = []
    for name, value in config.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {key}: {_text(item)}" for key, item in value.items())]
        else:
            lines.append(f"{name}: {_text(value)}")
    print("\n".join(lines))  # noqa: T201  (printing is what it is for)
    return None


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
