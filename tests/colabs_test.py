"""The lessons of colabs/ run from a clean kernel, and are kept without what they printed."""

import os
import pathlib
import sys

import pytest

nbformat = pytest.importorskip("nbformat", reason="it reads the lessons")
nbclient = pytest.importorskip("nbclient", reason="it runs the lessons")

ROOT = pathlib.Path(__file__).parent.parent
LESSONS = sorted(ROOT.glob("colabs/*.ipynb"))
PLOTS = {"quick_start": 2, "hugging_face": 1, "statistics_and_sweeps": 2, "continual_merging": 1}
MODULES = {"hugging_face": ("torch", "transformers")}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A folder with a command `mergejax` that runs this checkout, as an installed one would."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "mergejax"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mergejax "$@"\n')
    script.chmod(0o755)
    return folder


def test_every_lesson_is_here():
    assert {path.stem for path in LESSONS} == set(PLOTS)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_is_stripped_and_installs_what_is_missing_first(path):
    lesson = nbformat.read(path, as_version=4)
    nbformat.validate(lesson)
    code = [cell for cell in lesson.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(not cell.metadata for cell in lesson.cells)
    assert lesson.cells[0].source.startswith("# ")
    assert 'find_spec("mergejax") is None' in code[0].source
    assert "%pip install" in code[0].source


@pytest.mark.skipif(sys.platform == "win32", reason="shell commands of a lesson are POSIX ones")
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_runs_from_a_clean_kernel(path, command, monkeypatch):
    for module in MODULES.get(path.stem, ()):
        pytest.importorskip(module, reason="the lesson makes checkpoints with it")
    monkeypatch.setenv("PATH", os.pathsep.join([str(command), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lesson = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(lesson, timeout=240, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in lesson.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PLOTS[path.stem]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "pip install" not in printed
    assert "command not found" not in printed
