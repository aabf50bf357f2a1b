"""Settings of the test run: four CPU devices, no silent promotion, the folder of golden cases."""

import atexit
import collections
import os
import re
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from golden_case import LEFT_OUT, NOT_BUILT
from hypothesis import settings

if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# What one process compiles, the other workers and the launcher's processes need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mergejax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        default=str(Path(__file__).parent.parent / "third_party" / "golden"),
        help="folder of golden cases, CASE.json beside CASE.safetensors",
    )


# Files that train; that compare with recorded numbers or other processes' bytes; or whose checks
# hang on the last bit. They are compiled as a user's programs are.
OPTIMIZED = {
    *("images_test", "launcher_test", "suite_test", "texts_test", "train_test"),
    *("command_test", "compositions_test", "degenerate_test", "elementwise_test", "golden_test"),
    "spectral_test",
}


@pytest.fixture(autouse=True, scope="module")
def small_programs(request):
    """Compiles without XLA's costly optimisations, and forgets the programs behind each file.

    Most tests run each program once or twice on a handful of numbers: compiling was two thirds of
    their time, and what three thousand of them compile would keep gigabytes.
    """
    jax.config.update("jax_disable_most_optimizations", request.path.stem not in OPTIMIZED)
    yield
    jax.clear_caches()


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Runs elementwise chains in blocks of a handful of elements."""
    import mergejax.forms

    monkeypatch.setattr(mergejax.forms, "BLOCK", 5)


def _by_reason(reports, pattern):
    found = (re.search(pattern, reason) for reason in reports)
    return collections.Counter(match[1] for match in found if match)


def pytest_terminal_summary(terminalreporter):
    """One line with the golden cases that wait for their method, one with what was left out."""
    skipped = [str(report.longrepr[-1]) for report in terminalreporter.stats.get("skipped", [])]
    waiting = _by_reason(skipped, re.escape(NOT_BUILT) + r"(.*)")
    if waiting:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(waiting.items()))
        line = f"golden cases that wait for their method, {waiting.total()}: {names}"
        terminalreporter.write_line(line)
    passed = terminalreporter.stats.get("passed", [])
    properties = [set(report.user_properties) for report in passed]
    reasons = [value for found in properties for name, value in found if name == LEFT_OUT]
    for reason, count in sorted(collections.Counter(reasons).items()):
        terminalreporter.write_line(f"deliberate deviation met by {count} golden cases: {reason}")
