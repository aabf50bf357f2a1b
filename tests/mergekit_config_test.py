"""mergekit's configuration files: what they mean here, and what is refused."""

import json
import pathlib

import disk_models
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import mergejax as mj
from mergejax import command
from mergejax.checkpoints.mergekit import translate

GOLDEN = pathlib.Path(__file__).parent.parent / "third_party" / "golden"
MODELS = [
    {"model": "a", "parameters": {"weight": 0.5, "density": 0.4}},
    {"model": "b", "parameters": {"weight": 0.25, "density": 0.6}},
]

WEIGHED = [
    {"model": "a", "parameters": {"weight": 0.5}},
    {"model": "b", "parameters": {"weight": 0.25}},
]


def source(model, start, stop, **parameters):
    given = {"parameters": parameters} if parameters else {}
    return {"model": model, "layer_range": [start, stop], **given}


def sliced(*slices, method="linear", **more):
    """A configuration of slices, each of them a list of sources."""
    rows = [{"sources": sources} for sources in slices]
    return {"merge_method": method, "slices": rows, "parameters": {"weight": 1.0}, **more}


def config(method, models=MODELS, **more):
    return {"merge_method": method, "base_model": "base", "models": models, **more}


@pytest.mark.parametrize("case", ["mergekit_yaml_ties", "mergekit_yaml_slerp_gradient"])
def test_a_configuration_gives_what_mergekit_gave(case, tmp_path, monkeypatch, capsys):
    facts = json.loads((GOLDEN / f"{case}.json").read_text())
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    given = facts["hyperparameters"]["config"]
    for model in ("base", "expert0", "expert1"):
        prefix = f"{model}/"
        own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        if own:
            disk_models.write(tmp_path / model, own)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(given))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        command.launch(["merge", "--mergekit", "merge.yml", "--out", "out", "--quiet"])
    assert (status.value.code, capsys.readouterr().err) == (0, "")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {n.removeprefix("expected/"): x for n, x in tensors.items() if "expected/" in n}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(
            found[name], x, rtol=1e-5, atol=facts["tolerance"]["atol"], err_msg=name
        )


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (config("task_arithmetic", WEIGHED), "total(weights=[0.5, 0.25])|scale(scaling=1.0)"),
        (
            config("task_arithmetic", WEIGHED, parameters={"normalize": True, "lambda": 0.7}),
            "mean(weights=[0.5, 0.25])|scale(scaling=0.7)",
        ),
        (
            config("dare_ties", parameters={"consensus_method": "count"}),
            "drop(rate=[0.6, 0.4], rescale='norm')|weigh(weights=[0.5, 0.25])|"
            "elect_sign(by='count', zero='plus')|total()|scale(scaling=1.0)",
        ),
        (
            config("linear", [*WEIGHED, {"model": "base"}]),
            "linear(weights=[0.5, 0.25], normalize=True)",
        ),
    ],
)
def test_methods_are_translated(given, method):
    found = translate(given)
    assert found["method"] == method
    assert (found["base"], found["experts"]) == ("base", ["a", "b"])
    mj.parse(found["method"])


def test_gradients_and_filters_per_model():
    models = [
        {"model": "a", "parameters": {"weight": [1.0, 0.0]}},
        {"model": "b", "parameters": {"weight": 0.5}},
    ]
    found = translate(config("task_arithmetic", models))
    inside = "'\\\\.\\\\d+\\\\.': by_depth([[1.0, 0.5], [0.0, 0.5]])"
    assert found["method"] == (
        f"total(weights=by_name({{{inside}, '.*': [1.0, 0.5]}}))|scale(scaling=1.0)"
    )
    base = {f"layers.{i}.w": np.zeros(1, np.float32) for i in range(3)}
    base["norm"] = np.zeros(1, np.float32)
    experts = [{name: np.full(1, x, np.float32) for name in base} for x in (1, 10)]
    merged = mj.merge(found["method"], base, experts)
    assert [float(x[0]) for x in merged.values()] == [6.0, 5.5, 5.0, 6.0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (config("ties", slices=[{"sources": []}]), "'models' or 'slices', not both"),
        (sliced([]), "name them under 'the sources of slice 0'"),
        (sliced([source("a", 2, 2)]), r"layer_range \[2, 2\] of 'a' is empty"),
        (sliced([source("a", 0, 2), source("b", 0, 3)]), "different numbers of layers"),
        (sliced([source("a", 0, "x")]), r"must be two layers, such as \[0, 8\], not \[0, 'x'\]"),
        (sliced([source("a", 0, 1)], [source("a", 0, 1), source("b", 0, 1)]), "merge twice"),
        (sliced([{**source("a", 0, 1), "layers": 1}]), "unknown key 'layers', known: layer_range"),
        (sliced([source("a", 0, 1, weight=[{"filter": "mlp", "value": 1}])]), "has filters, which"),
        (config("nearswap", parameters={"t": 1, "k": 1}), "nearswap has no parameter 'k'"),
        (config("ties", parameters={"rescale": True}), "'rescale' cannot be honoured"),
        (config("ties", modules={}), "'modules' of mergekit cannot be honoured"),
        (config("ties", tokenizer_source="union"), "can only be 'base'"),
        (config("ties", modles=[]), "no key 'modles', did you mean 'models'"),
        (config("tis"), "'tis' is not translated, did you mean 'ties'"),
        (config("ties", parameters={"densty": 1}), "no parameter 'densty', did you mean 'density'"),
        (config("ties", parameters={"int8_mask": True}), "'int8_mask' is not needed"),
        (config("ties", parameters={"lambda": "x"}), "'lambda' must be a number"),
        (config("ties", [{"model": "a"}]), "'weight' is missing for a model"),
        (config("ties", [{"path": "a"}]), "each of models needs a path"),
        (config("ties", []), "no list of models"),
        ({"merge_method": "ties", "models": MODELS}, "needs a base_model"),
        (config("slerp"), "'t' is missing"),
        (config("della", parameters={"density": [1, 0]}, models=[{"model": "a", "parameters": {
            "weight": 1}}]), "'density' that differs between layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(given, sentence):
    with pytest.raises(mj.MergeError, match=sentence):
        translate(given)


def test_the_translation_is_printed(tmp_path, capsys):
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config("linear", [{"model": "my a"}, {"model": "b"}],
                                          parameters={"weight": 1.0})))  # fmt: skip
    with pytest.raises(SystemExit) as status:
        command.launch(["merge", "--mergekit", str(path), "--print-config"])
    assert status.value.code == 0
    assert capsys.readouterr().out == (
        "mergejax merge \\\n  --base base \\\n  --method 'linear(weights=[1.0, 1.0], "
        "normalize=True)' \\\n  --expert 'my a' \\\n  --expert b\n"
    )


@pytest.mark.parametrize("content", ["a: [", "- 1", ""])
def test_files_that_are_no_configuration(content, tmp_path, capsys):
    path = tmp_path / "merge.yml"
    path.write_text(content)
    with pytest.raises(SystemExit) as status:
        command.launch(["merge", "--mergekit", str(path), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert (status.value.code, len(err.splitlines())) == (2, 1)
    assert str(path) in err


PLAIN = [{"model": "a"}, {"model": "b"}]


@pytest.mark.parametrize(
    ("given", "method", "base"),
    [
        (
            config("nuslerp", WEIGHED),
            "nuslerp(weights=[0.5, 0.25], scope='tensor', of='deltas')", 1,
        ),
        (
            {"merge_method": "nuslerp", "models": WEIGHED, "parameters": {
                "nuslerp_flatten": False, "nuslerp_row_wise": True}},
            "nuslerp(weights=[0.5, 0.25], scope='column', of='weights')", 0,
        ),
        (
            {"merge_method": "multislerp", "models": WEIGHED},
            "multislerp(weights=[0.5, 0.25], normalize=True, of='weights')", 0,
        ),
        (
            {"merge_method": "karcher", "models": PLAIN, "parameters": {"max_iter": 3}},
            "karcher(iterations=3, tolerance=1e-05)", 0,
        ),
        (
            config("model_stock", PLAIN, parameters={"filter_wise": True}),
            "model_stock(scope='row')", 1,
        ),
        (config("sce", PLAIN, parameters={"select_topk": 0.4}), "sce(density=0.4)", 1),
        (config("ram", PLAIN), "ram(epsilon=1e-05)", 1),
        (
            config("ramplus_tl", PLAIN, parameters={"r": 0.2}),
            "ram_plus(epsilon=1e-05, gain=0.2, limit=0.2, scope='tensor')", 1,
        ),
    ],
)  # fmt: skip
def test_other_methods_are_translated(given, method, base):
    found = translate(given)
    assert (found["method"], found["base"]) == (method, "base" if base else None)
    assert found["experts"] == ["a", "b"]
    mj.parse(method)


@pytest.mark.parametrize(
    ("method", "settings", "ours"),
    [
        ("nearswap", {"t": 0.1}, "nearswap(t=0.1)"),
        ("arcee_fusion", {}, "arcee_fusion()"),
    ],
)
def test_methods_of_one_expert(method, settings, ours):
    models = [{"model": "base"}, {"model": "a"}]
    found = translate(config(method, models, parameters=settings))
    assert found == {"method": ours, "base": "base", "experts": ["a"]}


def test_karcher_counts_the_base_as_a_model_and_slerp_begins_with_it():
    assert translate(config("karcher", PLAIN))["experts"] == ["a", "b", "base"]
    found = translate(config("slerp", PLAIN[:1], parameters={"t": 0.1}))
    assert (found["experts"], found["base"]) == (["base", "a"], None)


def stacked(tmp_path, monkeypatch, capsys, given):
    """What a configuration makes of three models of four layers, and the models."""
    monkeypatch.chdir(tmp_path)
    models = {}
    for i, name in enumerate(("base", "a", "b")):
        models[name] = disk_models.weights(i, np.float32, layers=4, spread=0.5 * (i > 0))
        own = {"num_hidden_layers": 4, "layer_types": list("abcd")}
        disk_models.write(tmp_path / name, models[name], config=own)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(given))
    with pytest.raises(SystemExit) as status:
        command.launch(["merge", "--mergekit", "merge.yml", "--out", "out"])
    out, err = capsys.readouterr()
    assert (status.value.code, err) == (0, "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    return load_file(tmp_path / "out" / "model.safetensors"), models, config, out


def layer(model, number):
    start = f"model.layers.{number}."
    return {n.removeprefix(start): x for n, x in model.items() if n.startswith(start)}


def test_layers_of_several_models_are_stacked(tmp_path, monkeypatch, capsys):
    """Equal to what mergekit 0.1.5 gave for this configuration on a random Llama."""
    given = sliced([source("a", 0, 3)], [source("b", 1, 4, scale=0.5)], method="passthrough")
    given["parameters"] = {}
    found, models, config, out = stacked(tmp_path, monkeypatch, capsys, given)
    assert "layers 0 to 2 are a[0:3]\nlayers 3 to 5 are b[1:4]\n" in out
    assert (config["num_hidden_layers"], config["layer_types"]) == (6, list("abcbcd"))
    for new, (name, old, scale) in enumerate(
        [("a", 0, 1), ("a", 1, 1), ("a", 2, 1), ("b", 1, 0.5), ("b", 2, 0.5), ("b", 3, 0.5)]
    ):
        for part, x in layer(models[name], old).items():
            assert np.array_equal(layer(found, new)[part], x * np.float32(scale))
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert np.array_equal(found[embedding], models["a"][embedding])
    assert np.array_equal(found[norm], models["b"][norm] * np.float32(0.5))
    assert len(layer(found, 6)) == 0


def test_layers_are_merged_slice_by_slice(tmp_path, monkeypatch, capsys):
    """Gradients run over each slice; what lies outside takes their first values, as there."""
    given = sliced(
        [source("base", 0, 2), source("a", 2, 4, weight=0.7)],
        [source("base", 1, 4), source("b", 0, 3, weight=[0.0, 1.0])],
        method="task_arithmetic", base_model="base",
    )  # fmt: skip
    found, models, config, _ = stacked(tmp_path, monkeypatch, capsys, given)
    assert config["num_hidden_layers"] == 5
    plan = [(0, "a", 2, 0.7), (1, "a", 3, 0.7), (1, "b", 0, 0.0), (2, "b", 1, 0.5), (3, "b", 2, 1)]
    for new, (old, expert, other, weight) in enumerate(plan):
        for part, x in layer(models["base"], old).items():
            delta = layer(models[expert], other)[part] - x
            assert np.array_equal(layer(found, new)[part], x + np.float32(weight) * delta)
    for name, expert, weight in (
        ("model.embed_tokens.weight", "a", 0.7),
        ("model.norm.weight", "b", 0.0),
    ):
        base = models["base"][name]
        delta = models[expert][name] - base
        assert np.array_equal(found[name], base + np.float32(weight) * delta)


def test_ranges_of_layers_that_do_not_fit(tmp_path, capsys):
    _, a, b = disk_models.family(tmp_path)
    start = ["check", "--expert", a, "--expert", b, "--method", "passthrough()"]
    for ranges, sentence in (
        (["expert0[0:3]", "expert1[0:1]"], "expert0[0:3], but 'expert0' has 2 layers"),
        (["expert0[0:1]"], "expert 'expert1' is in no range of layers; leave it out"),
        (["expert0[0:1]", "expert2[0:1]"], "names no model of this merge, did you mean 'expert"),
        (["expert0[1:1]"], "expert0[1:1] is an empty range"),
        (["expert0[0:1]+expert1[0:2]"], "differ in length"),
        (["expert0[0:1]", "expert0[0:1]+expert1[0:1]"], "different numbers of models"),
        (["expert0[:1]"], "is no range; write 'MODEL[0:8]'"),
    ):
        given = [x for text in ranges for x in ("--layers", text)]
        with pytest.raises(SystemExit) as status:
            command.launch([str(x) for x in [*start, *given]])
        err = capsys.readouterr().err
        assert status.value.code == 2
        assert sentence in err, err
