import io
import json
import math
import re

import jax
import numpy as np
import pytest
from PIL import Image

from mergejax import train
from mergejax.data.task import Split
from mergejax.eval import metrics, plots, predict, report, tables
from mergejax.models import vit


def test_wilson_gives_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    cases = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611)}
    for (right, total), wanted in cases.items():
        estimate = metrics.wilson(right, total)
        assert estimate.value == right / total
        assert (estimate.low, estimate.high) == pytest.approx(wanted, abs=5e-5)
    assert metrics.wilson(7, 7).high == 1.0


@pytest.mark.parametrize("shared", [True, False])
def test_interval_of_the_mean_agrees_with_the_bootstrap(shared):
    generator = np.random.default_rng(0)
    scans = generator.random([1, 400]) < 0.7  # what all tasks have in common
    tasks = [
        np.where(generator.random(400) < 0.6, scans[0], generator.random(400) < 0.7)
        for _ in range(3)
    ]
    estimate = metrics.mean_over_tasks(tasks, shared)
    assert estimate.value == pytest.approx(np.mean(tasks))
    draws = []
    for _ in range(4000):
        rows = generator.integers(400, size=[3, 400])
        rows = np.broadcast_to(rows[:1], rows.shape) if shared else rows
        draws.append(np.mean([task[row] for task, row in zip(tasks, rows, strict=True)]))
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.004)


def test_shared_scans_widen_the_interval():
    same = [np.arange(100) < 70] * 4
    shared = metrics.mean_over_tasks(same, True)
    apart = metrics.mean_over_tasks(same, False)
    assert shared.high - shared.low == pytest.approx(2 * (apart.high - apart.low))


def test_tasks_count_equally_whatever_their_size():
    estimate = metrics.mean_over_tasks([np.ones(10), np.zeros(1000)], shared=False)
    assert estimate == (0.5, 0.5, 0.5)


def test_a_difference_is_paired():
    first = [np.arange(1000) % 2 == 0]
    second = [first[0].copy()]
    second[0][:20] = False  # loses 10 images, wins none
    lead = metrics.difference(first, second, shared=True)
    assert lead.value == pytest.approx(0.01)
    assert metrics.exceeds_noise(lead)
    other = [np.arange(1000) % 2 == 1]  # as good, but right elsewhere
    even = metrics.difference(first, other, shared=True)
    assert even.value == 0
    assert not metrics.exceeds_noise(even)
    spread = math.sqrt(1000 / 999 / 1000)
    assert even.high == pytest.approx(metrics.Z * spread)


@pytest.fixture(scope="module")
def small():
    model = vit.VisionTransformer(patch=4, width=16, depth=1, heads=2)
    generator = np.random.default_rng(0)
    classes = {"one": 3, "two": 2}
    body, heads = train.initial(model, np.zeros([1, 8, 8, 1], np.float32), classes, seed=0)
    heads = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), heads)
    splits = {
        name: Split(
            generator.random([n, 8, 8, 1], np.float32),
            generator.integers(classes[name], size=n).astype(np.int32),
        )
        for name, n in (("one", 13), ("two", 7))
    }
    return model, body, heads, splits, list(classes.values())


@pytest.mark.parametrize("chunk", [4, 20, 100])
def test_predictions_are_those_of_each_task_alone(small, chunk, monkeypatch):
    model, body, heads, splits, classes = small
    monkeypatch.setattr(predict, "CHUNK", chunk)
    images = predict.bundle(list(splits.values()), classes)
    head = predict.join_heads(heads, list(splits))
    right = np.asarray(predict.is_right(model, body, head, images))
    for name, found in predict.by_task(right, images, list(splits)).items():
        logits = train.logits(model, body, heads[name], splits[name].inputs)
        wanted = np.asarray(logits).argmax(axis=1) == splits[name].labels
        np.testing.assert_array_equal(found, wanted)


def test_an_ensemble_averages_probabilities(small):
    model, body, heads, splits, classes = small
    bodies = [body, jax.tree.map(lambda leaf: 3 * leaf, body)]
    images = predict.bundle(list(splits.values()), classes)
    head = predict.join_heads(heads, list(splits))
    right = np.asarray(predict.ensemble_right(model, bodies, head, images))
    for name, found in predict.by_task(right, images, list(splits)).items():
        shares = [
            jax.nn.softmax(train.logits(model, b, heads[name], splits[name].inputs)) for b in bodies
        ]
        wanted = np.asarray(shares[0] + shares[1]).argmax(axis=1) == splits[name].labels
        np.testing.assert_array_equal(found, wanted)


def merge_record(name, chain, validation, **right):
    return {
        "name": name,
        "kind": "merge",
        "chain": chain,
        "given": "(" in name,
        "settings": [chain],
        "search": None,
        "seconds": 0.1,
        "calibration": None,
        "validation": dict.fromkeys(right, validation),
        "test": {task: report.encode(values) for task, values in right.items()},
    }


@pytest.fixture
def records():
    n = np.arange(200)
    found = [
        {"name": "base", "kind": "base", "test": {"x": "10" * 100, "y": "10" * 100}},
        {
            "name": "expert_x",
            "kind": "expert",
            "task": "x",
            "test": {"x": "1" * 200, "y": "0" * 200},
        },
        {
            "name": "expert_y",
            "kind": "expert",
            "task": "y",
            "test": {"x": "0" * 200, "y": "1" * 100 + "0" * 100},
        },
        merge_record("average", "average()", 0.6, x=n < 120, y=n < 60),
        merge_record("ties", "ties(density=0.3)", 0.8, x=n < 160, y=n < 81),
        merge_record("ties(density=0.3)", "ties(density=0.3)", 0.8, x=n < 160, y=n < 81),
        merge_record("dare", "dare(rate=0.5)", 0.9, x=n < 160, y=n < 80),
    ]
    return {record["name"]: record for record in found}


TASKS = {name: {"labels": ["a", "b"], "validation": 50, "test": 200} for name in ("x", "y")}


def test_the_verdict_is_chosen_on_validation_and_weighs_its_leads_on_test(records):
    results = report.summarise(records, TASKS, shared=True)
    verdict = results["verdict"]
    # ties is better on test by one image, but nothing is chosen on test
    assert verdict["best"] == "dare"
    assert verdict["runner_up"]["name"] == "ties"
    assert verdict["runner_up"]["lead"]["value"] == pytest.approx(-0.0025)
    assert not verdict["runner_up"]["exceeds_noise"]
    assert verdict["average"]["lead"]["value"] == pytest.approx(0.15)
    assert verdict["average"]["exceeds_noise"]
    assert verdict["sentence"].startswith(
        "Take dare(rate=0.5): it has the best mean accuracy on the validation examples (90.0 %); "
        "on test it reaches 60.0 ["
    )
    assert (
        "points behind the runner-up ties(density=0.3), which is within the noise"
        in verdict["sentence"]
    )
    assert "points ahead of the plain average, which is more than the noise" in verdict["sentence"]
    assert verdict["base"]["lead"]["value"] > 0
    assert "points ahead of the base, which is" in verdict["sentence"]


def test_the_verdict_keeps_a_base_that_no_merge_beats(records):
    records["base"] = {**records["base"], "test": dict.fromkeys(TASKS, "1" * 200)}
    verdict = report.summarise(records, TASKS, shared=True)["verdict"]
    assert verdict["sentence"].startswith(
        "Keep the base: of the merges dare(rate=0.5) has the best"
    )
    assert "points behind the base, which is more than the noise" in verdict["sentence"]


def test_the_runner_up_is_another_chain(records):
    del records["dare"]
    verdict = report.summarise(records, TASKS, shared=True)["verdict"]
    assert verdict["best"] == "ties"
    assert verdict["runner_up"]["name"] == "average"


def test_rows_are_normalised_by_the_experts_own_accuracy(records):
    results = report.summarise(records, TASKS, shared=True)
    rows = {row["name"]: row for row in results["models"]}
    assert rows[report.OWN]["mean"]["value"] == pytest.approx(0.75)
    assert rows[report.OWN]["normalised"] == 1.0
    assert rows["average"]["mean"]["value"] == pytest.approx(0.45)
    assert rows["average"]["normalised"] == pytest.approx((0.6 / 1 + 0.3 / 0.5) / 2)
    assert rows["average"]["accuracy"]["x"] == metrics.wilson(120, 200)._asdict()
    order = [row["kind"] for row in results["models"]]
    assert order == ["base", "expert", "expert", "own", "merge", "merge", "merge", "merge"]


def test_one_merge_alone_has_a_verdict(records):
    only = {name: records[name] for name in ("base", "expert_x", "expert_y", "average")}
    results = report.summarise(only, TASKS, shared=True)
    assert "runner_up" not in results["verdict"]
    assert results["verdict"]["sentence"].endswith("%).") is False
    assert results["verdict"]["sentence"].count(";") == 1
    none = {name: records[name] for name in ("base", "expert_x", "expert_y")}
    assert report.summarise(none, TASKS, shared=True)["verdict"] is None


def test_the_plain_table_is_aligned_and_whole(records):
    stream = io.StringIO()
    tables.show(report.summarise(records, TASKS, shared=True), stream)
    lines = stream.getvalue().splitlines()
    row = next(line for line in lines if line.startswith("dare"))
    assert row.split()[:5] == ["dare", "80.0", "40.0", "60.0", "[54.8,"]
    assert row.endswith("1  dare(rate=0.5)")
    average = next(line for line in lines if line.startswith("average"))
    assert average.index("average()") == row.index("dare(rate")
    assert "chosen on validation examples (50 a task), never on test" in lines[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (52, "chain, settings, seconds, normalised, x, y."),
        (66, "chain, settings, seconds, normalised."),
        (100, "chain."),
        (120, ""),
    ],
)
def test_a_terminal_shows_what_fits_and_says_what_does_not(records, width, left_out, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    tables.show(report.summarise(records, TASKS, shared=True), stream)
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert max(map(len, text.splitlines())) <= width
    assert "60.0 [54.8, 65.2]" in text
    assert "\u2026" not in text
    (found,) = re.findall(r"left out here: ([^.]*\.)", text) or [""]
    assert " ".join(found.split()) == left_out
    assert ("dare: dare(rate=0.5)" in text) == bool(left_out)


def test_brackets_of_chains_are_no_markup(records):
    records["ties"]["chain"] = "task_arithmetic(scaling=by_name({'a[bold]': [1.0, 2.0]}))"
    stream = io.StringIO()
    tables.show(report.summarise(records, TASKS, shared=True), stream)
    assert records["ties"]["chain"] in stream.getvalue()


def test_markdown_keeps_chains_with_bars(records):
    records["ties"]["chain"] = "drop(rate=0.5)|ties()"
    text = tables.markdown(report.summarise(records, TASKS, shared=True))
    rows = [line for line in text.splitlines() if "drop(rate=0.5)" in line]
    assert len(rows) == 1
    assert "`drop(rate=0.5)\\|ties()`" in rows[0]
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines()}) == 1


def searched():
    points = [(d, s) for d in (0.2, 0.5) for s in (0.5, 1.0, 2.0)]
    record = merge_record(
        "ties", "ties(density=0.5, scaling=2.0)", 0.8, x=np.ones(200), y=np.ones(200)
    )
    record["settings"] = [f"ties(density={d}, scaling={s})" for d, s in points]
    record["search"] = {
        "validation": [[d * s, 0.0] for d, s in points],
        "programs": 1,
        "compile_seconds": 1.0,
        "seconds": 0.5,
    }
    return record


def test_the_sweep_is_laid_out_by_density_and_scaling(records):
    sweeps = report.summarise({**records, "ties": searched()}, TASKS, True)["sweeps"]
    assert list(sweeps) == ["ties"]
    sweep = sweeps["ties"]
    assert sweep["rows"] == ["density", [0.2, 0.5]]
    assert sweep["columns"] == ["scaling", [0.5, 1.0, 2.0]]
    np.testing.assert_allclose(sweep["validation"], [[0.05, 0.1, 0.2], [0.125, 0.25, 0.5]])


def test_results_are_json_and_every_picture_is_drawn(records):
    results = report.summarise({**records, "ties": searched()}, TASKS, shared=True)
    results = json.loads(json.dumps(results, allow_nan=False))
    cosines, signs = plots.similarity([np.array([1.0, -2.0, 0.5]), np.array([0.5, 1.0, 0.0])])
    drawn = [
        plots.accuracies(results),
        plots.means(results),
        plots.deltas(["x", "y"], cosines, signs),
        plots.sweep("ties", results["sweeps"]["ties"]),
    ]
    for figure in drawn:
        content = io.BytesIO()
        figure.savefig(content, format="png")
        with Image.open(content) as picture:
            picture.verify()
        assert np.prod(picture.size) > 200_000


def test_similarity_of_known_deltas():
    cosines, signs = plots.similarity(
        [np.array([1.0, 1.0, 0.0, 2.0]), np.array([-1.0, 1.0, 3.0, 0.0]), np.zeros(4)]
    )
    np.testing.assert_allclose(cosines[0, 1], 0.0, atol=1e-12)
    np.testing.assert_allclose(signs[0, 1], 0.5)
    np.testing.assert_allclose([cosines[0, 2], signs[0, 2]], 0.0)
    np.testing.assert_allclose(np.diag(signs)[:2], 1.0)
