"""A suite: several seeds of the main job, more exams, fewer experts, and its tables and pages."""

import importlib.util
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

import mergejax as mj
from mergejax import fit, preflight, progress, search, suite, workdir
from mergejax.data import corrupt, images, texts
from mergejax.eval import orders, sections
from mergejax.models import bodies

pytestmark = pytest.mark.xdist_group("suite")  # one worker makes the runs that all tests read
ROOT = pathlib.Path(__file__).parent.parent
TASKS = ("mirror", "quadrants", "quarter_turn")


def read_config(name, argument=None):
    path = ROOT / "configs" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def small(**changes):
    """Digits at the size of a test, as a suite of two seeds."""
    config = read_config("digits.py").unlock()
    config.name, config.seeds = "digits, small", (0, 1)
    config.methods = ("average", "ties")
    config.data.tasks = TASKS
    config.data.held_out = ("negative", "half_turn_size")
    config.data.variants = 1
    config.model.width, config.model.depth, config.model.heads = 32, 1, 2
    config.training.pretrain.steps = 50
    config.training.finetune.steps = 25
    config.training.multi_task.steps = 25
    config.robustness = {"corruptions": ("noise", "contrast"), "examples": 50}
    config.scaling = {"counts": (2, 3), "methods": ("average",)}
    config.compressions = ("emr()",)
    config.search.ties = {"density": (0.3, 1.0), "scaling": (0.5, 1.0)}
    config.update(changes)
    return config.lock()


def launch(config, folder):
    book = workdir.Logbook(progress.Printer(io.StringIO()))
    origin = {"file": "digits.py", "argument": None, "overrides": {}}
    return suite.run(config, folder, book, origin)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One seed at first; then the same folder with two."""
    folder = tmp_path_factory.mktemp("suite")
    first = launch(small(seeds=(0,)), folder)
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("results*/*.json")}
    both = launch(small(), folder)
    return {"folder": folder, "first": first, "kept": kept, "both": both}


def test_finished_cells_are_not_run_twice(story):
    assert len(story["kept"]) == 10  # all three experts are no other merge than the main one
    assert all(path.stat().st_mtime_ns == moment for path, moment in story["kept"].items())


def test_every_model_has_mean_and_spread_of_all_that_is_measured(story):
    both = story["both"]
    assert both["seeds"] == [0, 1]
    assert both["held_out"] == ["negative", "half_turn_size"]
    assert both["corruptions"] == ["noise", "contrast"]
    rows = {row["name"]: row for row in both["models"]}
    assert {row["kind"] for row in rows.values()} == {
        "base", "expert", "own", "merge", "compressed", "ensemble", "multi_task",
    }  # fmt: skip
    for row in rows.values():
        assert set(row["accuracy"]) == set(TASKS)
        assert row["mean"]["count"] == 2
    average, ensemble = rows["average"], rows["ensemble"]
    for key in ("held_out", "corrupted", "seconds", "stored_bytes", "validation"):
        assert average[key]["count"] == 2
    assert 0.0 < average["held_out"]["mean"] < 1.0
    assert ensemble["stored_bytes"]["mean"] == len(TASKS) * average["stored_bytes"]["mean"]
    assert rows["ties"]["settings"] == 4
    assert average["stored_bytes"]["mean"] < rows["emr()"]["stored_bytes"]["mean"]
    assert rows["emr()"]["stored_bytes"]["mean"] < ensemble["stored_bytes"]["mean"]
    assert rows["emr()"]["held_out"] is None
    assert rows["emr()"]["corrupted"]["count"] == 2
    assert story["first"]["models"][0]["mean"]["count"] == 1


def test_lines_add_up_to_the_summary(story):
    text = (story["folder"] / "results.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    assert {line["part"] for line in lines} == {"test", "held_out", "noise", "contrast"}
    for row in story["both"]["models"]:
        for part, key in (("test", "mean"), ("held_out", "held_out")):
            if row["kind"] in ("own", "compressed") and part == "held_out":
                assert row[key] is None
                continue
            own = [x for x in lines if x["model"] == row["name"] and x["part"] == part]
            each = [np.mean([x["accuracy"] for x in own if x["seed"] == s]) for s in (0, 1)]
            assert row[key]["mean"] == pytest.approx(np.mean(each), abs=1e-6)
            assert row[key]["deviation"] == pytest.approx(np.std(each, ddof=1), abs=1e-4)


def test_fewer_experts_are_merged_anew(story):
    scaling = story["both"]["scaling"]
    assert list(scaling) == ["2", "3"]
    whole = next(row for row in story["both"]["models"] if row["name"] == "average")
    assert scaling["3"]["average"]["mean"] == pytest.approx(whole["normalised"]["mean"], abs=1e-5)
    assert scaling["2"]["average"]["mean"] != scaling["3"]["average"]["mean"]


def test_tables_hold_every_model(story):
    text = (story["folder"] / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(story["both"]["models"])
    assert len({line.count("|") for line in table}) == 1
    assert re.search(r"\| ties \| \d+\.\d ± \d+\.\d \|", text)
    latex = (story["folder"] / "results.tex").read_text()
    rows = re.findall(r"(.*)\\\\$", latex, re.MULTILINE)
    assert len(rows) == 1 + len(story["both"]["models"])
    assert len({row.count("&") for row in rows}) == 1
    assert r"$\pm$" in latex
    assert not re.search(r"(?<!\\)[%_#]", latex.split(r"\toprule")[1].split(r"\caption")[0])


def test_the_page_needs_nothing_but_itself(story):
    page = (story["folder"] / "report.html").read_text()
    assert 'name="viewport"' in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "http" not in page
    names = {path.name for path in story["folder"].glob("*.png")}
    assert names == {"bars.png", "pareto.png", "radar.png", "scaling.png", "ties_sweep.png",
                     "conflict.png"}  # fmt: skip
    assert page.count("data:image/png;base64,") == len(names)
    for name in names:
        with Image.open(story["folder"] / name) as picture:
            assert picture.width > 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "config.seeds must be one or more different integers"),
        ({"seeds": (1, 1)}, "config.seeds must be one or more different integers"),
        ({"name": "another"}, "holds results of the suite 'digits, small', not of 'another'"),
        ({"compressions": ("ties()",)}, "config.compressions: "),
        ({"robustness": {"corruptions": ("nois",), "examples": 5}}, "did you mean 'noise'"),
    ],
)
def test_bad_input_is_one_sentence(story, changes, message):
    before = {p: p.stat().st_mtime_ns for p in story["folder"].rglob("*") if p.is_file()}
    with pytest.raises(mj.MergeError) as raised:
        launch(small(**changes), story["folder"])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    after = {p: p.stat().st_mtime_ns for p in story["folder"].rglob("*") if p.is_file()}
    assert before == after


def test_a_held_out_task_with_an_expert_is_refused(tmp_path):
    config = small().copy_and_resolve_references().unlock()
    config.data.held_out = ("mirror",)
    with pytest.raises(mj.MergeError, match=r"'mirror' is one of config\.data\.tasks"):
        launch(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "argument", "known", "kinds"),
    [
        ("suites/images.py", "", images.SOURCES, corrupt.IMAGES),
        ("suites/images.py", "model=resnet,lora", images.SOURCES, corrupt.IMAGES),
        ("suites/digit_domains.py", "", images.SOURCES, corrupt.IMAGES),
        ("suites/texts.py", "lora", texts.SOURCES, corrupt.TEXTS),
    ],
)
def test_suite_configs_fit_what_reads_them(name, argument, known, kinds):
    config, less = read_config(name, argument), read_config(name, f"small,{argument}")
    assert f"--config=configs/{name}" in (ROOT / "configs" / name).read_text()
    assert config.methods == ("all",)
    assert less.methods == search.FEW
    assert len(config.seeds) >= 3
    assert len(config.data.held_out) == 2
    sets = [*config.data.tasks, *config.data.held_out, *config.data.get("pretraining", ())]
    assert set(sets) <= set(known)
    assert len(set(sets)) == len(sets)
    assert config.scaling.counts == tuple(range(2, len(config.data.tasks) + 1))
    for one in (config, less):
        if known is images.SOURCES:  # a package carries the weights of the text encoder
            bodies.build(one.model)
        assert set(one.robustness.corruptions) <= set(kinds)
        phases = {kind: fit.Settings(**one.training[kind]) for kind in one.training}
        assert bool(phases["finetune"].rank) == ("lora" in argument)
        planned, _ = preflight.plan(one)
        assert len(planned) > 40 if one is config else list(planned) == list(search.FEW)
    assert all(less.training[kind].steps < config.training[kind].steps for kind in config.training)


def test_an_unknown_model_of_a_suite_is_one_sentence():
    with pytest.raises(mj.MergeError, match="there is no such model, did you mean 'resnet'"):
        read_config("suites/images.py", "model=resnt")


def test_published_orders_are_checked_over_seeds_by_students_interval(story):
    """With two seeds a and b the mean is off by t = 12.706 times |a - b| / 2 at 95 %."""
    (order,) = orders.summarise(
        [
            [{"above": "ties", "below": "task_arithmetic", "lead": {"value": x}}]
            for x in (0.02, 0.03)
        ]
    )
    assert (order["value"], order["low"]) == pytest.approx((0.025, 0.025 - 12.7062 * 0.005))
    assert orders.verdict(order) == "not decided"
    assert story["both"]["orders"] == []  # of average and ties no order is published


def test_a_lead_on_the_same_examples_is_paired_and_named_by_the_method():
    right = {
        "average": [np.array([1, 1, 0, 0]), np.array([0, 1])],
        "task_arithmetic(scaling=0.3)": [np.array([1, 1, 1, 0]), np.array([0, 1])],
        "drop(rate=0.5)|ties()": [np.array([0, 0, 0, 0]), np.array([0, 0])],
    }
    (found,) = orders.leads(right, shared=False)
    assert (found["above"], found["below"]) == ("task_arithmetic", "average")
    assert found["lead"]["value"] == pytest.approx(0.125)  # a quarter of one of two tasks
    half = 1.96 * np.sqrt(np.var([0, 0, 1, 0], ddof=1) / 4) / 2
    assert found["lead"]["low"] == pytest.approx(0.125 - half, abs=1e-4)
    more = orders.summarise([[found]])
    assert "| task arithmetic > average | +12.5 |" in sections.markdown(orders.section(more))
