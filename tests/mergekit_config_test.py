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
    assert found["method"] == (
        "total(weights=by_depth([[1.0, 0.5], [0.0, 0.5]]))|scale(scaling=1.0)"
    )
    base = {f"layers.{i}.w": np.zeros(1, np.float32) for i in range(3)}
    experts = [{name: np.full(1, x, np.float32) for name in base} for x in (1, 10)]
    merged = mj.merge(found["method"], base, experts)
    assert [float(x[0]) for x in merged.values()] == [6.0, 5.5, 5.0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (config("ties", slices=[{"sources": []}]), "'slices' of mergekit cannot be honoured"),
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
        (config("dare_ties", parameters={"density": [1, 0]}, models=[{"model": "a", "parameters": {
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
