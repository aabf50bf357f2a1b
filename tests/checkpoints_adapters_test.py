"""LoRA adapters as experts: the exact product, or a refusal that names what is not plain LoRA."""

import json

import disk_models
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mergejax as mj

LAYER = "model.layers.0.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}


def adapter(folder, seed=0, layer=LAYER, rank=2, out=6, **config):
    random = np.random.default_rng(seed)
    folder.mkdir()
    state = {
        f"base_model.model.{layer}.lora_A.weight": random.normal(size=(rank, 6)),
        f"base_model.model.{layer}.lora_B.weight": random.normal(size=(out, rank)),
    }
    state = {name: x.astype(np.float32) for name, x in state.items()}
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return list(state.values())


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / np.sqrt(2))])
def test_an_adapter_is_the_base_and_its_product(rslora, scale, tmp_path):
    base, expert = disk_models.family(tmp_path, experts=1, dtype=np.float32)
    a, b = adapter(tmp_path / "lora", use_rslora=rslora)
    out = mj.merge_checkpoints(
        "task_arithmetic(scaling=0.5)", base, [tmp_path / "lora", expert], tmp_path / "out"
    )
    before, full, found = (load_file(p / "model.safetensors") for p in (base, expert, out))
    for name, x in before.items():
        wanted = np.float64(x) + 0.5 * (np.float64(full[name]) - x)
        if name == f"{LAYER}.weight":
            wanted = wanted + 0.5 * scale * (np.float64(b) @ np.float64(a))
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)
    recipe = json.loads((out / "mergejax.json").read_text())["recipe"]
    assert [expert["name"] for expert in recipe["experts"]] == ["lora", "expert0"]
    assert recipe["experts"][0]["xxh3_128"] != recipe["base"]["xxh3_128"]


def test_two_adapters_of_one_base_are_no_doubles(tmp_path):
    base, _ = disk_models.family(tmp_path, experts=1)
    for seed, name in enumerate("ab"):
        adapter(tmp_path / name, seed)
    experts = [tmp_path / name for name in "ab"]
    assert mj.merge_checkpoints("ties()", base, experts, tmp_path / "out").is_dir()
    adapter(tmp_path / "c", seed=1)
    with pytest.raises(mj.MergeError, match="'b' and 'c' hold the same values"):
        mj.merge_checkpoints("ties()", base, [*experts, tmp_path / "c"], tmp_path / "out2")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "has no magnitudes of 'model.layers.0.q_proj.weight'"),
        ({"bias": "some"}, "bias='some', but plain LoRA is read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', but plain LoRA is read"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\], but plain LoRA"),
        ({"lora_bias": True}, "lora_bias=True, but plain LoRA is read"),
        ({"peft_type": "IA3"}, "peft_type='IA3', but plain LoRA is read"),
        ({"r": 3}, "the configuration says rank 3"),
        ({"layer": "model.layers.7.q_proj"}, "'model.layers.7.q_proj.weight', which the base lack"),
        ({"out": 5}, r"by a matrix of shape \[5, 6\], but the base's has \[6, 6\]"),
    ],
)
def test_what_is_no_plain_adapter_of_this_base_is_refused(change, sentence, tmp_path):
    base, _ = disk_models.family(tmp_path, experts=1)
    adapter(tmp_path / "lora", **change)
    with pytest.raises(mj.MergeError, match=sentence) as caught:
        mj.merge_checkpoints("ties()", base, [tmp_path / "lora"], tmp_path / "out")
    assert "lora" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_needs_a_base_and_its_factors(tmp_path):
    adapter(tmp_path / "lora")
    base, expert = disk_models.family(tmp_path, experts=1)
    with pytest.raises(mj.MergeError, match=r"lora is an adapter and needs a base"):
        mj.merge_checkpoints("average()", None, [tmp_path / "lora", expert], tmp_path / "out")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(mj.MergeError, match=r"lora has no adapter_model.safetensors"):
        mj.merge_checkpoints("average()", base, [tmp_path / "lora"], tmp_path / "out")


def test_what_an_adapter_saves_whole_must_be_the_base_s(tmp_path):
    base, _ = disk_models.family(tmp_path, experts=1)
    adapter(tmp_path / "lora", modules_to_save=["embed_tokens"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    state = load_file(file)
    for key, sentence in {
        "model.embed_tokens.weight": "apart from the output layer that shares it in the base",
        "score.weight": "it saves 'score.weight', which the base lacks",
        "model.layers.0.q_proj.bias": "is a bias, but the configuration has bias='none'",
    }.items():
        save_file(state | {f"base_model.model.{key}": np.ones((10, 6), np.float32)}, file)
        with pytest.raises(mj.MergeError, match=sentence):
            mj.merge_checkpoints("ties()", base, [tmp_path / "lora"], tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [
        "llama", "rslora", "rank pattern", "gpt2", "dora", "dora gpt2", "bias all",
        "bias lora_only", "saved",
    ],
)  # fmt: skip
def test_peft_merges_its_adapter_into_the_same_model(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch makes the adapter")
    peft = pytest.importorskip("peft", reason="PEFT makes the adapter")
    transformers = pytest.importorskip("transformers", reason="transformers makes the base")
    torch.manual_seed(0)
    if "gpt2" in kind:
        settings = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
        model, targets = transformers.GPT2LMHeadModel(settings), ["c_attn"]
    else:
        settings = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            attention_bias="bias" in kind,
        )
        model, targets = transformers.LlamaForCausalLM(settings), ["q_proj", "down_proj"]
    model.save_pretrained(tmp_path / "base")
    pattern = {"down_proj": 3} if kind == "rank pattern" else {}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=targets,
        use_rslora=kind == "rslora",
        rank_pattern=pattern,
        fan_in_fan_out="gpt2" in kind,
        init_lora_weights=False,
        use_dora="dora" in kind,
        bias=kind.removeprefix("bias ") if "bias" in kind else "none",
        modules_to_save=["lm_head", "norm"] if kind == "saved" else None,
    )
    wrapped = peft.get_peft_model(model, config)
    for name, x in wrapped.named_parameters():  # as training would
        if "magnitude" in name or "modules_to_save" in name or (x.requires_grad and "bias" in name):
            x.data += 0.1 * torch.randn_like(x)
    wrapped.save_pretrained(tmp_path / "lora")
    out = mj.merge_checkpoints(
        "task_arithmetic(scaling=1.0)", tmp_path / "base", [tmp_path / "lora"], tmp_path / "out"
    )
    loaded = type(model).from_pretrained(out)
    wanted = wrapped.merge_and_unload().state_dict()
    for name, x in loaded.state_dict().items():
        np.testing.assert_allclose(x.numpy(), wanted[name].numpy(), rtol=1e-5, atol=1e-5)
