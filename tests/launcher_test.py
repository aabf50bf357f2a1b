import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import mergejax as mj
from mergejax import data, experiment
from mergejax.checkpoints import orbax

ROOT = pathlib.Path(__file__).parent.parent
TASKS = ("mirror", "negative", "checkered_parity")
SMALL = (
    "--config=configs/digits.py",
    f"--config.data.tasks={TASKS}",
    "--config.data.variants=2",
    "--config.model.width=32",
    "--config.model.depth=1",
    "--config.training.pretrain.steps=100",
    "--config.training.finetune.steps=50",
    "--config.training.multi_task.steps=50",
    "--config.search.task_arithmetic.scaling=(0.2, 0.5, 0.9)",
    "--config.search.ties.density=(0.3, 1.0)",
    "--config.search.ties.scaling=(0.5, 1.0)",
    "--config.search.fisher_coefficients.coefficients=(5,)",
    "--config.search.bayesian_groups.trials=4",
)
METHODS = "--config.methods=('average', 'task_arithmetic', 'ties')"


def command(workdir, *arguments):
    return [sys.executable, "-m", "mergejax.main", f"--workdir={workdir}", *arguments]


def launch(workdir, *arguments):
    return subprocess.run(
        command(workdir, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def kill_at(marker, workdir, *arguments):
    """Starts a run and kills it as soon as it prints a line that starts with the marker."""
    process = subprocess.Popen(
        command(workdir, *arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith(marker):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, f"the run ended before '{marker}'"


def files(folder):
    return {p: p.stat().st_mtime_ns for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def read(path):
    return json.loads(path.read_text())


def runs(workdir):
    """One workdir: killed in training, killed in merging, finished, run again, extended."""
    kill_at("train experts/mirror", workdir, *SMALL, METHODS)
    after_first = files(workdir)
    kill_at("average:", workdir, *SMALL, METHODS)
    after_second = files(workdir)
    finished = launch(workdir, *SMALL, METHODS)
    results = read(workdir / "results.json")
    after_third = files(workdir)
    again = launch(workdir, *SMALL, METHODS)
    after_fourth = files(workdir)
    again_results = read(workdir / "results.json")
    more = launch(
        workdir,
        *SMALL,
        "--config.methods=('regmean', 'regmean_plus_plus', 'featcal', 'fisher_coefficients', "
        "'bayesian_groups', 'drop(rate=0.3)|ties(density=0.5)')",
    )
    return {
        "workdir": workdir,
        "kills": (after_first, after_second),
        "finished": finished,
        "results": results,
        "again": again,
        "again_results": again_results,
        "files": (after_third, after_fourth),
        "more": more,
    }


def check_a_killed_run_leaves_no_half_written_file(story):
    first, second = story["kills"]
    for path in (*first, *second):
        if path.suffix == ".json" and path.exists() and "orbax" not in str(path):
            read(path)
    names = {path.name for path in (*first, *second)}
    assert not names & {"results.json", "results.md", "accuracy.png"}


def check_an_interrupted_run_continues(story):
    finished = story["finished"]
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "base: reused" in finished.stdout
    assert "experts/mirror: reused" in finished.stdout
    assert "merges: reused 1: average" in finished.stdout
    assert "train " not in finished.stdout
    assert "ties: 4 settings in one program" in finished.stdout


def check_results_hold_every_model_on_every_task(story):
    results = story["results"]
    kinds = {row["name"]: row["kind"] for row in results["models"]}
    assert kinds == {
        "base": "base",
        **{f"expert_{name}": "expert" for name in TASKS},
        "experts on their own tasks": "own",
        "average": "merge",
        "task_arithmetic": "merge",
        "ties": "merge",
        "ensemble": "ensemble",
        "multi_task": "multi_task",
    }
    rows = {row["name"]: row for row in results["models"]}
    for row in rows.values():
        shares = [row["accuracy"][name]["value"] for name in TASKS]
        assert row["mean"]["value"] == pytest.approx(np.mean(shares))
        assert row["mean"]["low"] < row["mean"]["value"] < row["mean"]["high"]
        for found in row["accuracy"].values():
            assert 0 <= found["low"] < found["value"] < found["high"] <= 1
    own = rows["experts on their own tasks"]
    for name in TASKS:
        accuracy = rows[f"expert_{name}"]["accuracy"][name]
        assert own["accuracy"][name] == accuracy
        assert accuracy["value"] > rows["base"]["accuracy"][name]["value"]
    assert {name: task["test"] for name, task in results["tasks"].items()} == dict.fromkeys(
        TASKS, 547
    )
    assert rows["ties"]["settings"] == 4
    assert rows["average"]["settings"] == 1
    assert 0 < rows["ties"]["seconds"] < 60


def check_the_best_merge_is_what_its_chain_says_and_predicts_what_the_table_says(story):
    # The launcher ran once more since, with other methods: the best one may be another.
    workdir = story["workdir"]
    results = read(workdir / "results.json")
    verdict = results["verdict"]
    rows = [row for row in results["models"] if row["kind"] == "merge"]
    assert verdict["chain"] == max(rows, key=lambda row: row["validation"])["chain"]
    best = experiment.load(workdir)
    assert best.chain == verdict["chain"]
    restored = {
        name: orbax.restore(workdir / "checkpoints" / name)
        for name in ("base", *(f"experts/{task}" for task in TASKS))
    }
    chain = mj.parse(verdict["chain"])
    if not chain.needs:
        experts = [restored[f"experts/{task}"] for task in TASKS]
        merged = mj.merge(chain, restored["base"], experts, names=TASKS)
        jax.tree.map(np.testing.assert_array_equal, merged, best.params)
    config = read(workdir / "config.json")["config"]
    tasks = data.digits.load(
        TASKS, config["data"]["train"], config["data"]["validation"], config["seed"]
    )
    row = next(row for row in rows if row["name"] == verdict["best"])
    for name, task in tasks.items():
        found = best.predict(task.test.inputs, task=name)
        wanted = [task.labels[label] for label in task.test.labels]
        share = np.mean([a == b for a, b in zip(found, wanted, strict=True)])
        assert share == pytest.approx(row["accuracy"][name]["value"])


def check_values_were_chosen_on_validation(story):
    record = read(story["workdir"] / "results" / "ties.json")
    means = np.mean(record["search"]["validation"], axis=1)
    assert record["settings"][int(np.argmax(np.round(means, 9)))] == record["chain"]
    # What the search measured under one trace is what the usual executor's merge gives.
    assert max(means) == pytest.approx(np.mean(list(record["validation"].values())), abs=0.004)
    assert record["search"]["programs"] == 1


def check_a_second_run_reuses_everything(story):
    again = story["again"]
    assert again.returncode == 0, again.stderr
    assert "merges: reused 3: average, task_arithmetic, ties" in again.stdout
    assert "base, experts and upper marks: reused 6 evaluations" in again.stdout
    assert not re.search(r"^(train|search|collect) ", again.stdout, re.MULTILINE)
    assert again_without_time(story["again_results"]) == again_without_time(story["results"])
    before, after = story["files"]
    kept = [p for p in before if p.parts[-2] == "results" or "checkpoints" in p.parts]
    assert len(kept) > 10
    note = story["workdir"] / "checkpoints" / "fingerprint.json"
    assert all(after[path] == before[path] for path in kept if path != note)


def again_without_time(results):
    return {key: value for key, value in results.items() if key != "training"}


def check_other_methods_are_added(story):
    more = story["more"]
    assert more.returncode == 0, more.stderr
    results = read(story["workdir"] / "results.json")
    rows = {row["name"]: row for row in results["models"]}
    former = {row["name"]: row for row in story["results"]["models"]}
    blockwise, searched = {"regmean_plus_plus", "featcal"}, {"fisher_coefficients"}
    grouped, chain = "bayesian_groups", "drop(rate=0.3)|ties(density=0.5)"
    assert set(rows) - set(former) == {"regmean", chain, grouped, *searched, *blockwise}
    average = rows["average"]["mean"]["value"]
    assert all(rows[name]["kind"] == "procedure" for name in blockwise)
    assert all(rows[name]["mean"]["value"] > average for name in blockwise)
    assert rows["featcal"]["chain"].startswith("featcal(scaling=")
    record = read(story["workdir"] / "results" / "fisher_coefficients.json")
    assert len(record["search"]["validation"]) == 5
    assert record["chain"] in record["settings"]
    assert record["search"]["programs"] == 1
    assert re.match(r"bayesian\(ridge=by_name\(.*scaling=by_name", rows[grouped]["chain"])
    lost = rows["regmean"]["without_statistics"]
    assert "norm/scale" in lost
    assert "block_0/attention/out/bias" in lost
    assert not any(name.endswith("kernel") for name in lost)
    text = (story["workdir"] / "results.md").read_text()
    assert f"- regmean: {', '.join(f'`{leaf}`' for leaf in lost)}\n" in text
    assert all(rows[name] == former[name] for name in former)
    assert rows["regmean"]["calibration"] == {"examples": 128}
    assert rows["regmean"]["settings"] == 7
    assert rows["drop(rate=0.3)|ties(density=0.5)"]["given"]
    assert "collect gram" in more.stdout
    assert not {"norm_square", "output_gram"} & set(more.stdout.split())  # nobody needs them


def check_pictures_are_whole(story):
    for name in ("accuracy", "means", "deltas", "ties_sweep"):
        with Image.open(story["workdir"] / f"{name}.png") as picture:
            picture.verify()
        assert min(picture.size) > 300
    text = (story["workdir"] / "results.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(shown) == 4
    assert all((story["workdir"] / name).is_file() for name in shown)
    assert read(story["workdir"] / "results.json")["verdict"]["sentence"] in text


def check_result_files_name_no_place_on_this_machine(story):
    for name in ("results.json", "results.md", "config.json"):
        text = (story["workdir"] / name).read_text()
        assert str(story["workdir"].parent) not in text
        assert str(ROOT) not in text


def check_the_config_is_kept_with_what_was_overridden(story):
    kept = read(story["workdir"] / "config.json")
    assert kept["config"]["model"]["width"] == 32
    assert kept["config"]["training"]["pretrain"]["learning_rate"] > 0
    assert kept["from"]["file"] == "digits.py"
    assert kept["from"]["overrides"]["model.width"] == 32
    assert set(kept["from"]["overrides"]) == {a[9:].split("=")[0] for a in (*SMALL[1:], METHODS)}


def check_the_printed_lines_work(story):
    lines = story["again"].stdout.splitlines()
    python = [line[2:] for line in lines[-3:]]
    assert python[0] == "from mergejax import experiment"
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(python)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert len(re.findall(r"'\d'", found.stdout)) == experiment.SAMPLES
    (merge,) = [line for line in lines if line.startswith("  python -m mergejax.main")]
    words = shlex.split(merge)
    assert words[:3] == ["python", "-m", "mergejax.main"]
    again = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert "merges: reused 1: " in again.stdout
    assert f"Open {story['workdir'].as_posix()}/results.md" in again.stdout


def check_another_config_is_refused(story):
    before = files(story["workdir"])
    other = launch(story["workdir"], *SMALL, METHODS, "--config.model.width=16", "--config.seed=3")
    assert other.returncode == 2
    assert other.stdout == ""
    (line,) = other.stderr.splitlines()
    assert "model.width: 32 there, 16 wanted" in line
    assert "seed: 0 there, 3 wanted" in line
    assert files(story["workdir"]) == before


def test_a_run_is_killed_continued_reused_and_extended(tmp_path):
    # One test, so that its runs are made once however tests are spread over processes.
    story = runs(tmp_path / "runs" / "digits")
    check_a_killed_run_leaves_no_half_written_file(story)
    check_an_interrupted_run_continues(story)
    check_results_hold_every_model_on_every_task(story)
    check_the_best_merge_is_what_its_chain_says_and_predicts_what_the_table_says(story)
    check_values_were_chosen_on_validation(story)
    check_a_second_run_reuses_everything(story)
    check_other_methods_are_added(story)
    check_pictures_are_whole(story)
    check_result_files_name_no_place_on_this_machine(story)
    check_the_config_is_kept_with_what_was_overridden(story)
    check_the_printed_lines_work(story)
    check_another_config_is_refused(story)


DIGITS = "--config=configs/digits.py"
BAD = {
    "method": (
        (DIGITS, "--config.methods=('tis',)"),
        "config.methods: no method is called 'tis', did you mean 'ties'?",
    ),
    "two problems": (
        ("--config=configs/digits.py:methods=ties(densty=0.1)+dare(rate=1.5)",),
        "ties() has no parameter 'densty', did you mean 'density'?\n"
        "dare(rate=...) must be in [0, 1], not 1.5",
    ),
    "impossible": (
        (
            DIGITS,
            "--config.methods=('slerp', 'drop(rate=0.5)', "
            "\"task_arithmetic(scaling=by_name({'blok': 1, '.*': 0}))\")",
        ),
        "'slerp' takes exactly 2 experts, not 6\n"
        "'drop(rate=0.5)' leaves one model per expert; end it with a reduction such as mean(), "
        "total() or a named method\n"
        "scale: pattern 'blok' of by_name matches no leaf",
    ),
    "key": (
        (DIGITS, "--config.modle.width=3", "--config.sed=1"),
        "the config has no key 'modle.width', did you mean 'model.width'?\n"
        "the config has no key 'sed', did you mean 'seed'?",
    ),
    "type": ((DIGITS, "--config.data.train=many"), "flag --config.data.train=many: "),
    "argument": (
        ("--config=configs/digits.py:method=ties",),
        "config argument 'method=ties': there is no argument 'method', did you mean 'methods'?",
    ),
    "config": (
        ("--config=configs/digit.py",),
        "--config=configs/digit.py: there is no such file; give one of configs/",
    ),
    "flag": ((DIGITS, "--wrkdir=x"), "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    "task": (
        (DIGITS, "--config.data.tasks=miror"),
        "config.data.tasks: there is no digits task 'miror', did you mean 'mirror'?",
    ),
    "calibration": (
        (DIGITS, "--config.calibration.examples=0"),
        "config.calibration.examples must be at least 1, not 0",
    ),
    "model": ((DIGITS, "--config.model.patch=3"), "config.model cannot be built: images of 8x8"),
    "data set": (("--config=configs/images.py", "--config.data_dir=no/such/folder"), "scene15"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(name, tmp_path):
    arguments, sentence = BAD[name]
    found = launch(tmp_path / "run", *arguments)
    assert found.returncode == 2
    for part in sentence.split("\n"):
        assert part in found.stderr
    assert "Traceback" not in found.stderr
    if "\n" in sentence:
        assert len(found.stderr.splitlines()) == sentence.count("\n") + 1
    assert found.stdout == ""
    assert not (tmp_path / "run").exists()


def test_debug_shows_where(tmp_path):
    found = launch(tmp_path / "run", DIGITS, "--config.methods=tis", "--debug")
    assert found.returncode == 2
    assert "Traceback" in found.stderr
    assert found.stderr.splitlines()[-1].startswith("config.methods: no method is called 'tis'")


def test_a_file_is_no_workdir_and_results_need_their_models(tmp_path):
    (tmp_path / "file").write_text("")
    found = launch(tmp_path / "file", DIGITS)
    assert found.returncode == 2
    assert found.stderr.endswith("is a file; choose a folder\n")
    (tmp_path / "run" / "results").mkdir(parents=True)
    (tmp_path / "run" / "results" / "base.json").write_text("{}")
    found = launch(tmp_path / "run", DIGITS)
    assert found.returncode == 2
    assert "holds results, but not the checkpoints that they come from" in found.stderr


def test_other_failures_are_one_sentence_with_status_1(tmp_path):
    (tmp_path / "run" / "checkpoints" / "fingerprint.json").mkdir(parents=True)
    found = launch(tmp_path / "run", DIGITS, "--config.methods=average")
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith("the run failed (IsADirectoryError: ")
