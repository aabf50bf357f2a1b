import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import disk_models
import jax
import pytest

import mergejax as mj
from mergejax import command

ROOT = pathlib.Path(__file__).parent.parent


def call(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mergejax", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def answer(capsys, *arguments):
    """The exit status, standard output and standard error of a command line."""
    with pytest.raises(SystemExit) as status:
        command.launch([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status.value.code, captured.out, captured.err


def flags(models, *more):
    base, *experts = models
    return ["--base", base, *(x for e in experts for x in ("--expert", e)), *more]


def test_help_imports_no_jax():
    script = (
        "import sys; from mergejax import command\n"
        "try: command.launch(['--help'])\n"
        "except SystemExit: print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "merge models into a new folder" in ran.stdout
    assert ran.stdout.endswith("False False\n")


def test_missing_paths_are_told_without_jax(tmp_path):
    base = disk_models.family(tmp_path)[0]
    more = flags([base, "absent1", "absent2"], "--method", "tis()", "--out", base / "out")
    script = (
        "import sys; from mergejax import command\n"
        f"try: command.launch({['merge', *map(str, more)]})\n"
        "except SystemExit as status: print(status.code, 'jax' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "2 False\n"
    first, second, third = ran.stderr.splitlines()
    assert first.startswith("absent1: there is no such file or folder")
    assert second.startswith("absent2: there is no such file or folder")
    assert "lies inside the input" in third


def test_a_merge_from_the_command_line(tmp_path):
    models = disk_models.family(tmp_path)
    out = tmp_path / "out"
    ran = call("merge", *flags(models, "--method", "average()", "--out", out))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"{out}: 8 tensors of 2 experts" in ran.stdout
    expected = mj.merge_checkpoints("average()", models[0], models[1:], tmp_path / "expected")
    assert disk_models.snapshot(out) == disk_models.snapshot(expected)
    ran = call("merge", *flags(models, "--method", "average()", "--out", out))
    assert ran.returncode == 0
    assert "nothing to do" in ran.stdout


def test_a_killed_merge_continues(tmp_path):
    models = disk_models.family(tmp_path, rows=4000, width=64, layers=12)
    arguments = ["merge", *flags(models, "--method", "average()", "--out", tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "mergejax", *map(str, arguments)], cwd=ROOT)
    journal = tmp_path / ".out.merging" / "journal.jsonl"
    while process.poll() is None and (not journal.exists() or b'"out"' not in journal.read_bytes()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    assert killed == (not (tmp_path / "out").exists())
    ran = call(*arguments)
    assert ran.returncode == 0
    expected = mj.merge_checkpoints("average()", models[0], models[1:], tmp_path / "expected")
    assert disk_models.snapshot(tmp_path / "out") == disk_models.snapshot(expected)
    assert not journal.parent.exists()


def test_a_disk_that_fills_up_is_told_and_the_same_command_continues(tmp_path):
    pytest.importorskip("resource")
    models = disk_models.family(tmp_path, rows=4000, width=64, layers=12)
    arguments = ["merge", *flags(models, "--method", "average()", "--out", tmp_path / "out")]
    largest = (models[0] / "model.safetensors").stat().st_size * 7 // 10
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest}))\n"
        "from mergejax import command; command.launch()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments), "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    staged = tmp_path / ".out.merging"
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert f"what was done is kept in {staged}; the same command continues" in ran.stderr
    assert b'"out"' in (staged / "journal.jsonl").read_bytes()
    assert not (tmp_path / "out").exists()
    ran = call(*arguments)
    assert ran.returncode == 0
    assert f"continuing from {staged}" in ran.stdout
    expected = mj.merge_checkpoints("average()", models[0], models[1:], tmp_path / "expected")
    assert disk_models.snapshot(tmp_path / "out") == disk_models.snapshot(expected)
    assert not staged.exists()


@pytest.mark.parametrize("count", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_devices(count, tmp_path):
    """Elementwise, whole-model and spectral methods; this process has four devices."""
    assert jax.device_count() == 4
    base, *experts = map(str, disk_models.family(tmp_path, rows=40, width=24))
    methods = ["dare(rate=0.5)", "ties(density=0.3)", "iso_c()"]
    script = (
        "import jax, mergejax as mj\n"
        f"for i, method in enumerate({methods}):\n"
        f"    mj.merge_checkpoints(method, {base!r}, {experts}, f'{tmp_path}/{{i}}')\n"
        "print(jax.device_count())"
    )
    several = f"--xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "XLA_FLAGS": several, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    python = [sys.executable, "-c", script]
    ran = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.stdout == f"{count}\n", ran.stderr
    for i, method in enumerate(methods):
        out = mj.merge_checkpoints(method, base, experts, tmp_path / f"expected{i}")
        assert disk_models.snapshot(tmp_path / str(i)) == disk_models.snapshot(out), method


def test_check_forecasts_and_writes_nothing(tmp_path, capsys):
    models = disk_models.family(tmp_path)
    before = disk_models.snapshot(tmp_path)
    status, out, err = answer(
        capsys, "check", *flags(models, "--method", "ties()", "--out", tmp_path / "out")
    )
    assert (status, err) == (0, "")
    assert out.startswith("8 tensors can be merged in 4 passes over the inputs: ")
    assert disk_models.snapshot(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--shard-size", "300"]])
def test_the_forecast_of_the_disk_is_what_the_merge_takes(more, tmp_path, capsys):
    arguments = flags(
        disk_models.family(tmp_path), "--method", "ties()", "--out", tmp_path / "out", *more
    )
    status, out, _ = answer(capsys, "check", *arguments, "--json")
    forecast = json.loads(out)["forecast"]
    assert status == 0
    assert answer(capsys, "merge", *arguments, "--quiet")[0] == 0
    taken = sum(len(content) for content in disk_models.snapshot(tmp_path / "out").values())
    assert forecast["disk_bytes"] == taken
    assert (forecast["passes"], forecast["tensors"]) == (4, 8)
    assert forecast["memory_bytes"] < 600e6


def test_check_answers_in_json_with_every_tensor(tmp_path, capsys):
    models = disk_models.family(tmp_path)
    disk_models.write(models[2], disk_models.weights(2, width=8))
    status, out, _ = answer(
        capsys, "check", *flags(models, "--method", "tis()", "--json", "--out", tmp_path / "out")
    )
    found = json.loads(out)
    assert status == 2
    assert found["problems"][0] == {"problem": "no method is called 'tis', did you mean 'ties'?"}
    assert len([p for p in found["problems"] if p.get("model") == "expert 'expert1'"]) == 8
    assert found["forecast"] == {}


def test_more_than_three_tensors_of_one_cause_are_counted(tmp_path, capsys):
    models = disk_models.family(tmp_path)
    disk_models.write(models[2], disk_models.weights(2, layers=1))
    status, _, err = answer(
        capsys, "check", *flags(models, "--method", "ties()", "--out", tmp_path / "out")
    )
    assert status == 2
    assert len(err.splitlines()) == 3  # three tensors, one line each
    disk_models.write(models[2], {"model.norm.weight": disk_models.weights(2)["model.norm.weight"]})
    status, _, err = answer(
        capsys, "check", *flags(models, "--method", "ties()", "--out", tmp_path / "out")
    )
    assert len(err.splitlines()) == 1
    assert "expert 'expert1' lacks 7 tensors: 'model.embed_tokens.weight', " in err
    assert " and 4 more; the base has it" in err


def test_a_config_file_stands_for_flags(tmp_path, capsys):
    base, *experts = disk_models.family(tmp_path)
    config = tmp_path / "merge.py"
    config.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        f"    return ml_collections.ConfigDict(dict(base={str(base)!r}, seed=0,\n"
        f"        experts={tuple(map(str, experts))!r}, method='ties()', out=''))\n"
    )
    out = tmp_path / "out"
    status, _, err = answer(
        capsys, "merge", f"--config={config}", "--config.method=average()", "--out", out
    )
    assert (status, err) == (0, "")
    expected = mj.merge_checkpoints("average()", base, experts, tmp_path / "expected")
    assert disk_models.snapshot(out) == disk_models.snapshot(expected)
    status, _, err = answer(capsys, "merge", f"--config={config}", "--config.methd=average()")
    assert status == 2
    assert "methd" in err


def test_methods_lists_and_explains(capsys):
    status, out, _ = answer(capsys, "methods")
    assert status == 0
    assert "| [`ties`](#ties) |" in out
    status, out, _ = answer(capsys, "methods", "ties")
    assert out.startswith("## ties")
    status, _, err = answer(capsys, "methods", "tis")
    assert (status, err) == (2, "no method is called 'tis', did you mean 'ties'?\n")


def test_an_unforeseen_failure_is_one_sentence_and_status_one(tmp_path, capsys, monkeypatch):
    from mergejax.checkpoints import merge

    models = disk_models.family(tmp_path)
    arguments = ["merge", *flags(models, "--method", "average()", "--out", tmp_path / "out")]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "verify", fail)
    status, _, err = answer(capsys, *arguments)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert str(tmp_path / ".out.merging") in err
    assert "the same command continues" in err
    status, _, err = answer(capsys, *arguments, "--debug")
    assert "Traceback" in err


def test_the_command_is_quiet_when_told_to_be(tmp_path, capsys):
    models = disk_models.family(tmp_path)
    arguments = flags(models, "--method", "average()", "--out", tmp_path / "out", "--quiet")
    assert answer(capsys, "merge", *arguments) == (0, "", "")


def test_a_read_only_place_is_refused(tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    models = disk_models.family(tmp_path / "in")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    arguments = flags(models, "--method", "average()", "--out", closed / "out")
    status, _, err = answer(capsys, "merge", *arguments)
    assert (status, err) == (2, f"{closed} is read-only; choose another output\n")
