"""Adapters merged into one adapter, from the command line, as peft writes and loads them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mergejax as mj
from mergejax import command

torch = pytest.importorskip("torch", reason="peft is written in it")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small Llama on disk and two adapters of it, of different ranks and scalings."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=30,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name, rank, rslora in (("a", 2, False), ("b", 3, True)):
        lora = peft.LoraConfig(
            r=rank, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = peft.get_peft_model(opened(folder / "base"), lora)
        for key, x in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(x, std=0.3)
        model.save_pretrained(folder / name)
    return folder


def opened(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def deltas(made, adapter):
    """What an adapter changes in its base, by leaf."""
    before = opened(made / "base").state_dict()
    model = peft.PeftModel.from_pretrained(opened(made / "base"), adapter).merge_and_unload()
    return {n: (x - before[n]).numpy() for n, x in model.state_dict().items()}


def flags(made, out, method, *more):
    experts = ["--expert", str(made / "a"), "--expert", str(made / "b")]
    return [*experts, "--method", method, "--out", str(out), *more]


def test_the_sum_of_two_adapters_loads_in_peft(made, tmp_path, capsys):
    text = "concatenate(weights=[0.5, 0.25])"
    assert command.run(["check", *flags(made, tmp_path / "out", text)]) == 0
    assert "4 layers of 2 adapters, rank 5 can be merged" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert command.run(["merge", *flags(made, tmp_path / "out", text)]) == 0
    a, b, merged = (deltas(made, f) for f in (made / "a", made / "b", tmp_path / "out"))
    assert sum(np.abs(x).max() > 0 for x in merged.values()) == 4
    for name, x in merged.items():
        wanted = 0.5 * np.float64(a[name]) + 0.25 * np.float64(b[name])
        np.testing.assert_allclose(x, wanted, atol=1e-6, err_msg=name)
    recipe = json.loads((tmp_path / "out" / "mergejax.json").read_text())["recipe"]
    assert [expert["name"] for expert in recipe["experts"]] == ["a", "b"]
    assert str(tmp_path) not in json.dumps(recipe)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_chosen_rank_and_type_and_the_same_bytes_again(made, tmp_path, capsys):
    text = "svd(rank=2)"
    more = ("--dtype", "float16")
    assert command.run(["merge", *flags(made, tmp_path / "out", text, *more)]) == 0
    found = load_file(tmp_path / "out" / FILE)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float16)}
    assert {min(x.shape) for x in found.values()} == {2}
    a, b, merged = (deltas(made, f) for f in (made / "a", made / "b", tmp_path / "out"))
    for name, x in merged.items():
        u, s, v = np.linalg.svd(np.float64(a[name]) + b[name]) if x.ndim == 2 else (0, 0, 0)
        if np.max(s) > 0:
            best = (u[:, :2] * s[:2]) @ v[:2]
            # Both factors are rounded to float16, 2**-11 of the largest entry each.
            np.testing.assert_allclose(x, best, atol=4 * 2**-11 * np.abs(best).max())
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert command.run(["merge", *flags(made, tmp_path / "out", text, *more)]) == 0
    assert "holds this very merge already" in capsys.readouterr().out
    with pytest.raises(mj.MergeError, match="is not empty; choose another output"):
        command.run(["merge", *flags(made, tmp_path / "out", "svd(rank=3)")])
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert command.run(["merge", *flags(made, tmp_path / "out", "svd(rank=3)", "--overwrite")]) == 0


def changed(made, folder, change=lambda state: state, **config):
    """A copy of adapter b with other values or another configuration."""
    folder.mkdir()
    known = json.loads((made / "b" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    save_file(change(load_file(made / "b" / FILE)), folder / FILE)
    return folder


@pytest.mark.parametrize(
    ("change", "config", "method", "more", "said"),
    [
        (None, {"base_model_name_or_path": "x"}, "cat()", [], "merge adapters of one base"),
        (lambda s: {n: x * np.nan for n, x in s.items()}, {}, "cat()", [], "48 non-finite values"),
        (lambda s: dict(list(s.items())[:4]), {}, "cat()", [], "down_proj"),
        (None, {"use_dora": True}, "cat()", [], "use_dora=True, but plain LoRA is read"),
        (None, {}, "ties(density=0.2)", [], "merges models; name their base with --base, or take"),
        (None, {}, "concatenat()", [], "did you mean 'concatenate'"),
        (None, {}, "svd(rank=100)", [], "rank"),
        (None, {}, "cat()", ["--vocabulary", "base"], "vocabulary is for models"),
        (None, {}, "cat()", ["--shard-size", "1GB"], "shard_size is for models"),
        (lambda s: {n: x * 1e5 for n, x in s.items()}, {}, "cat()", ["--dtype", "float16"],
         "beyond the range of float16"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_one_sentence(
    made, tmp_path, change, config, method, more, said, capsys
):
    other = changed(made, tmp_path / "c", change or (lambda s: s), **config)
    given = ["--expert", str(made / "a"), "--expert", str(other), "--method", method, *more]
    given += ["--out", str(tmp_path / "out")]
    with pytest.raises(mj.MergeError) as raised:
        command.run(["merge", *given])
    assert said in str(raised.value)
    with pytest.raises(mj.MergeError):
        command.run(["check", *given])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_one_adapter_under_two_names_is_refused(made, tmp_path):
    twin = changed(made, tmp_path / "twin")
    given = [*flags(made, tmp_path / "out", "cat()"), "--expert", str(twin)]
    with pytest.raises(mj.MergeError, match="'b' and 'twin' hold the same values"):
        command.run(["merge", *given])
    assert not (tmp_path / "out").exists()
