"""Every public name says what it is by a short example, and the example runs.

As with ``pytest --doctest-modules``, an example has the names of its own module. One that says
"After the example of ``x``" goes on where that of ``x`` ends.
"""

import doctest
import inspect
import re
from functools import cache

import pytest
import torch
from _ext.public_names import public_names

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def by_module() -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for name, thing in public_names().items():
        modules.setdefault(thing.__module__, []).append(name)
    return modules


def examples(name: str) -> doctest.DocTest:
    """The example in a name's own docstring."""
    thing = public_names()[name]
    module = inspect.getmodule(thing)
    # A subclass must not pass with the docstring of its parent.
    text = inspect.cleandoc(thing.__doc__ or "")
    names = vars(module) | {"torch": torch}
    if before := re.search(r"After the example of ``(\w+)``", text):
        names |= left_by(before[1])
    return doctest.DocTestParser().get_doctest(text, names, name, module.__file__, 0)


@cache
def left_by(short: str) -> dict[str, object]:
    """What there is when the example of a name has run; whether it is right is its own test."""
    (name,) = (name for name in public_names() if name.rpartition(".")[2] == short)
    test = examples(name)
    torch.manual_seed(0)
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lambda _: None, clear_globs=False)
    return test.globs


def failures(test: doctest.DocTest) -> str:
    """What an example gives in place of what it says; empty where it is right."""
    lines: list[str] = []
    torch.manual_seed(0)
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append)
    return "".join(lines)


def test_every_public_name_has_an_example():
    assert [name for name in public_names() if not examples(name).examples] == []
    assert len(public_names()) > 100


def test_an_example_has_its_section():
    lost = [
        name
        for name, thing in public_names().items()
        if ">>>" in (thing.__doc__ or "")
        and not re.search(r"^Examples?:\n {4}\S", inspect.cleandoc(thing.__doc__), re.M)
    ]
    assert lost == []


def test_few_examples_are_not_run():
    skipped = {
        name
        for name in public_names()
        if any(doctest.SKIP in each.options for each in examples(name).examples)
    }
    assert skipped == {  # two fetch MNIST, one trains
        "bayesdiff.data.sources.torchvision_images",
        "bayesdiff.data.two_digits.two_digits",
        "bayesdiff.pipeline.run",
    }


@pytest.mark.parametrize("module", sorted(by_module()))
def test_the_examples_run(module):
    wrong = {name: failures(examples(name)) for name in by_module()[module]}
    assert {name: text for name, text in wrong.items() if text} == {}


def test_a_wrong_example_is_seen():
    parse = doctest.DocTestParser().get_doctest
    assert not failures(parse(">>> 1 + 1\n2\n", {}, "right", "", 0))
    assert "Expected" in failures(parse(">>> 1 + 1\n3\n", {}, "wrong", "", 0))
    assert "ZeroDivisionError" in failures(parse(">>> 1 / 0\n2\n", {}, "raises", "", 0))
