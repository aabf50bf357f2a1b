"""What a merge writes is loaded by the libraries that will use it."""

import numpy as np
import pytest

import mergejax as mj

torch = pytest.importorskip("torch", reason="PyTorch loads the results")
transformers = pytest.importorskip("transformers", reason="transformers loads the results")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama with biases, tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "bert": ("BertModel", "BertConfig", SMALL | {"intermediate_size": 48}),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {**SMALL, "intermediate_size": 48, "image_size": 8, "patch_size": 4},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4,
                                               "vocab_size": 64, "n_positions": 16}),
    "t5, tied": ("T5ForConditionalGeneration", "T5Config", T5),
}  # fmt: skip


def make(kind, seed, dtype):
    name, config, settings = KINDS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def output(kind, model):
    if kind == "vit":
        pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8).to(model.dtype)
        return model(pixel_values=pixels).last_hidden_state
    ids = torch.arange(12).reshape(2, 6)
    if kind.startswith("t5"):
        return model(input_ids=ids, decoder_input_ids=ids).logits
    found = model(input_ids=ids)
    return found.last_hidden_state if kind == "bert" else found.logits


def by_hand(models):
    """Task arithmetic in float32, rounded once."""
    states = [model.state_dict() for model in models]
    merged = {}
    for name, x in states[0].items():
        first, *others = (state[name] for state in states)
        if x.is_floating_point():
            total = sum(other.float() - first.float() for other in others)
            merged[name] = (first.float() + 0.5 * total).to(x.dtype)
        else:
            merged[name] = first
    models[0].load_state_dict(merged)
    return models[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_model_that_merging_by_hand_gives(kind, dtype, tmp_path):
    models = [make(kind, seed, dtype) for seed in range(3)]
    paths = [tmp_path / name for name in ("base", "a", "b")]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path, max_shard_size="20KB")
    out = mj.merge_checkpoints(
        "task_arithmetic(scaling=0.5)", paths[0], paths[1:], tmp_path / "out", shard_size=20_000
    )
    loaded, info = type(models[0]).from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == dtype
    wanted = by_hand(models)
    count = sum(1 for _ in loaded.parameters())
    assert count == sum(1 for _ in wanted.parameters())
    tolerance = 1e-6 if dtype == torch.float32 else 0
    for name, x in wanted.state_dict().items():
        np.testing.assert_allclose(
            loaded.state_dict()[name].float().numpy(), x.float().numpy(), rtol=tolerance, atol=1e-6
        )
    with torch.no_grad():
        difference = (output(kind, loaded.eval()) - output(kind, wanted)).abs().max()
    assert difference <= (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.filterwarnings("ignore")
def test_directional_methods_know_the_layout_of_gpt2(tmp_path):
    """Its kernels are stored [in, out], unlike everybody else's."""
    from mergejax.checkpoints.job import prepare
    from mergejax.checkpoints.request import make_request

    for seed, name in enumerate(("base", "a")):
        make("gpt2", seed, torch.float32).save_pretrained(tmp_path / name)
    request = make_request(tmp_path / "base", [tmp_path / "a"], "iso_c()", tmp_path / "out")
    job, problems, _ = prepare(request)
    assert not problems.sentences()
    layouts = {info.layout for info in job.merged if info.role == "kernel"}
    assert layouts == {"io"}
