"""The examples: doctests of the public names, and the README's Python blocks."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

import crossent as ce

README = Path(__file__).parents[1] / "README.md"
# Of these the reference has no examples on purpose: it is the specification of the functions that do.
CALLABLES = sorted(name for name in ce.__all__ if callable(getattr(ce, name)) and not inspect.ismodule(getattr(ce, name)))


@pytest.fixture(autouse=True)
def _settings_survive():
    """Examples may set threads, levels and the cache."""
    level, threads = ce.simd_level(), ce.get_num_threads()
    yield
    ce.set_simd_level(level)
    ce.set_num_threads(threads)
    ce.set_cache_limit(512 << 20)


def run(examples, name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    text = io.StringIO()
    runner.run(examples, out=text.write)
    assert runner.failures == 0, f"{name}:\n{text.getvalue()}"


def find(thing, name):
    finder = doctest.DocTestFinder(recurse=False)
    return [t for t in finder.find(thing, name, globs={"ce": ce, "np": np}) if t.examples]


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring(name):
    thing = getattr(ce, name)
    found = find(thing, name)
    assert found, f"{name} has no example"
    for examples in found:
        run(examples, name)


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring_names_every_parameter(name):
    thing = getattr(ce, name)
    doc = inspect.getdoc(thing)
    assert doc
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        parameters = inspect.signature(thing.__init__).parameters
    for parameter in parameters:
        if parameter != "self":
            assert re.search(rf"\b{parameter}\b", doc), f"{name}: {parameter} is not in the docstring"


def test_the_package_itself():
    found = find(ce, "crossent")
    assert found
    for examples in found:
        run(examples, "crossent")


def test_modules_of_the_package():
    """Whatever other docstrings have examples."""
    for info in pkgutil.walk_packages(ce.__path__, "crossent."):
        module = importlib.import_module(info.name)
        for thing_name, thing in vars(module).items():
            if getattr(thing, "__module__", None) == info.name and inspect.isfunction(thing):
                for examples in find(thing, thing_name):
                    run(examples, f"{info.name}.{thing_name}")


def test_signatures():
    """Those of the contract: names, kinds and defaults."""
    want = {
        "logsumexp": "(x, /, axis=-1, *, keepdims=False, out=None)",
        "softmax": "(x, /, axis=-1, *, out=None)",
        "log_softmax": "(x, /, axis=-1, *, out=None)",
        "softmax_vjp": "(grad_output, probs, /, axis=-1, *, out=None)",
        "log_softmax_vjp": "(grad_output, log_probs, /, axis=-1, *, out=None)",
        "nll_loss": "(log_probs, target, /, *, axis=-1, weight=None, ignore_index=-100, reduction='mean')",
    }
    nll = "(log_probs, target, /, *, axis=-1, weight=None, ignore_index=-100, reduction='mean'"
    want["nll_loss_with_grad"] = f"{nll}, grad_output=None, out=None)"
    options = "sample_weight=None, normalizer=None, z_loss=0.0, softcap=None, temperature=1.0, where=None"
    loss = f"(logits, target, /, *, axis=-1, weight=None, ignore_index=-100, reduction='mean', label_smoothing=0.0, {options}"
    want["cross_entropy"] = f"{loss})"
    want["cross_entropy_with_grad"] = f"{loss}, grad_output=None, out=None)"
    want["score_tokens"] = "(logits, tokens, /, *, axis=-1, ignore_index=None, shift=False, entropy=False, rank=False)"
    want["topk_logprobs"] = "(logits, k, /, *, axis=-1)"
    kl = "(p_logits, q_logits, /, *, axis=-1, temperature=1.0, reduction='none'"
    want["kl_divergence"] = f"{kl})"
    want["kl_divergence_with_grad"] = f"{kl}, grad_output=None, out=None)"
    for name, text in want.items():
        for module in (ce, ce.reference):
            signature = inspect.signature(getattr(module, name))
            bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
            got = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
            assert got == text, f"{module.__name__}.{name}"


# --- README ----------------------------------------------------------------------------------------------------------------------------


def blocks():
    """Line number and code of each block; in a list they are indented."""
    text = README.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(?:python|py|pycon)\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start()].count("\n") + 2, textwrap.dedent(match.group(2))


def test_the_readme_has_python_blocks():
    text = README.read_text(encoding="utf-8")
    assert len(list(blocks())) == len(re.findall(r"^ *```(?:python|py|pycon)$", text, re.MULTILINE)) >= 3


def test_readme_blocks():
    """In order and in one namespace, as a reader would paste them; a prompt makes a block a doctest, which compares the output."""
    namespace = {"__name__": "readme"}
    for line, code in blocks():
        if code.lstrip().startswith(">>>"):
            parser = doctest.DocTestParser()
            examples = parser.get_doctest(code, namespace, f"README line {line}", str(README), line)
            run_into(examples, namespace)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)
        # A comment after a print is what it prints.
        said = re.findall(r"print\(.*\)\s*#\s*(.+)", code)
        got = printed.getvalue().splitlines()
        for want in said:
            assert any(want.strip() == g.strip() for g in got), f"README line {line}: {want!r} is not printed; got {got}"


def run_into(examples, namespace):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    text = io.StringIO()
    runner.run(examples, out=text.write, clear_globs=False)
    namespace.update(examples.globs)
    assert runner.failures == 0, text.getvalue()
