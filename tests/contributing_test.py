"""The code that the documentation shows is run as a reader would run it."""

import pathlib
import re

import pytest

import mergejax as mj

ROOT = pathlib.Path(__file__).parent.parent


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)


@pytest.fixture
def registry():
    before = dict(mj.METHODS)
    yield mj.METHODS
    mj.METHODS.clear()
    mj.METHODS.update(before)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md", "docs/adapters.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(name, registry):
    blocks = python_blocks(name)
    assert blocks
    scope = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)


def test_contributing_registers_a_method_that_the_language_knows(registry):
    scope = {"__name__": "__main__"}
    exec(compile("\n".join(python_blocks("CONTRIBUTING.md")), "CONTRIBUTING.md", "exec"), scope)
    assert repr(mj.parse("median(scaling=0.7)")) == "median(scaling=0.7)"


def test_the_reference_page_is_current():
    from mergejax import reference

    written = (ROOT / "docs" / "methods.md").read_text()
    assert written == reference.page(), "run: python -m mergejax.reference > docs/methods.md"
