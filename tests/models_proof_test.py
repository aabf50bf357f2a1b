"""Models against PyTorch: logits, every weight there and back, real networks on real images."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj

torch = pytest.importorskip("torch", reason="PyTorch is the reference; pip install torch")
transformers = pytest.importorskip(
    "transformers", reason="transformers is the reference; pip install 'mergejax[clients]'"
)
SHARED = pathlib.Path("../shared")
NETWORKS = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet44": "resnet44-014dd654.th",
    "resnet56": "resnet56-4bfd9763.th",
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
WIDTHS = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2}
CASES = {
    "BertModel": ("BertConfig", WIDTHS | {"num_attention_heads": 2}),
    "BertForMaskedLM": ("BertConfig", WIDTHS | {"num_attention_heads": 3}),
    "BertForMaskedLM untied": (
        "BertConfig", WIDTHS | {"num_attention_heads": 6, "tie_word_embeddings": False},
    ),
    "BertForSequenceClassification": (
        "BertConfig", WIDTHS | {"num_attention_heads": 4, "num_labels": 5, "hidden_act": "relu"},
    ),
    "GPT2LMHeadModel": ("GPT2Config", GPT2 | {"n_head": 3}),
    "GPT2LMHeadModel untied": (
        "GPT2Config",
        GPT2 | {"n_head": 4, "n_inner": 20, "tie_word_embeddings": False,
                "scale_attn_by_inverse_layer_idx": True},
    ),
    "GPT2Model": ("GPT2Config", GPT2 | {"n_head": 2, "scale_attn_weights": False}),
    "LlamaForCausalLM": (
        "LlamaConfig", WIDTHS | {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "LlamaForCausalLM tied": (
        "LlamaConfig",
        WIDTHS | {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8,
                  "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                  "rope_parameters": LLAMA3},
    ),
    "Qwen2ForCausalLM": (
        "Qwen2Config", WIDTHS | {"num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "Qwen2ForCausalLM tied": (
        "Qwen2Config",
        WIDTHS | {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True,
                  "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "MistralForCausalLM": (
        "MistralConfig",
        WIDTHS | {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 3},
    ),
    "MistralForCausalLM wide": (
        "MistralConfig",
        WIDTHS | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16,
                  "sliding_window": None, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def pretrained(case, **more):
    """A model of transformers whose every weight and bias is random, and its config.json."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings, **more)
    model = (
        getattr(transformers, case.split()[0])
        ._from_config(config, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms begin as constants
            weight.add_(0.2 * torch.randn(weight.shape))
    return model, config.to_dict() | {"architectures": [type(model).__name__]}


def first(output):
    """Logits, or the hidden states of a body."""
    return output[0] if isinstance(output, tuple) else output


def same(ours, theirs):
    """Bit for bit, names included."""
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        x = x.numpy() if isinstance(x, torch.Tensor) else x
        assert ours[name].dtype == x.dtype, name
        assert ours[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_and_every_weight_returns(case):
    model, config = pretrained(case)
    state = model.state_dict()
    module, variables = mj.models.from_torch(state, config)
    same(mj.models.to_torch(variables, config, like=state), state)
    count = sum(x.size for x in jax.tree.leaves(variables))
    assert count == sum(x.numel() for x in model.parameters())
    ids = np.random.default_rng(1).integers(2, 61, (2, 11)).astype(np.int32)
    seen = np.ones_like(ids)
    seen[1, 7:] = 0  # padding on the right
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(seen))[0]
    ours = first(module.apply(variables, jnp.asarray(ids), jnp.asarray(seen)))
    theirs = theirs.numpy()
    if theirs.ndim == 3:  # what stands at padding means nothing
        ours, theirs = ours[seen > 0], theirs[seen > 0]
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= 1e-5


@pytest.mark.parametrize(
    ("case", "dtype"), [("Qwen2ForCausalLM tied", torch.bfloat16), ("GPT2LMHeadModel", None)]
)
def test_a_folder_that_transformers_writes_is_loaded_with_its_bits(case, dtype, tmp_path):
    model, config = pretrained(case)
    model.to(dtype or torch.float32).save_pretrained(tmp_path / "model")
    module, variables = mj.models.load(tmp_path / "model")
    _, wanted = mj.models.from_torch(model.state_dict(), config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), variables, wanted)
    ids = np.arange(5, dtype=np.int32)[None]
    with jax.numpy_dtype_promotion("standard"), torch.no_grad():  # Flax's norms widen bfloat16
        ours = np.asarray(module.apply(variables, jnp.asarray(ids)), np.float32)
        theirs = model(torch.from_numpy(ids).long())[0].float().numpy()
    # Half a unit in the last place of 8 bits, a few dozen times in two layers; float32 as above.
    bound = 1e-5 if dtype is None else 2**-9 * 24
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def test_layers_beyond_the_ninth_keep_their_place():
    model, config = pretrained("GPT2LMHeadModel")
    config |= {"n_layer": 12}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | config)).eval()
    state = model.state_dict()
    _, variables = mj.models.from_torch(state, config)
    same(mj.models.to_torch(variables, config, like=state), state)


def test_all_names_that_do_not_fit_are_told_at_once():
    model, config = pretrained("LlamaForCausalLM")
    state = dict(model.state_dict())
    for i in range(2):
        del state[f"model.layers.{i}.mlp.up_proj.weight"]
        state[f"model.layers.{i}.self_attn.q_norm.weight"] = torch.ones(6)
    del state["model.norm.weight"]
    state["lm_head.weight"] = state["lm_head.weight"][:, :-1]
    with pytest.raises(mj.MergeError) as told:
        mj.models.from_torch(state, config)
    text = str(told.value)
    assert "'model.layers.{0-1}.mlp.up_proj.weight'" in text
    assert "'model.norm.weight'" in text
    assert "'model.layers.{0-1}.self_attn.q_norm.weight'" in text
    assert "'lm_head.weight' has shape [61, 23]" in text


def test_tied_weights_that_differ_are_refused():
    model, config = pretrained("LlamaForCausalLM")
    with pytest.raises(mj.MergeError, match=r"'lm_head.weight' is a copy of .*tie_word_embeddings"):
        mj.models.from_torch(model.state_dict(), config | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForCausualLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"model_type": "qwen"}, "did you mean 'qwen2'"),
        ({}, "neither architectures nor model_type"),
    ],
)
def test_an_unknown_architecture_is_told_with_the_nearest_known_one(config, message):
    with pytest.raises(mj.MergeError, match=message):
        mj.models.from_torch({}, config)


def test_a_rotation_that_cannot_be_built_is_refused():
    _, config = pretrained("LlamaForCausalLM")
    config |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(mj.MergeError, match="rope_type='yarn'"):
        mj.models.from_torch({}, config)


def torch_resnet(state, x):
    """The networks of He et al. 2016, section 4.2, by PyTorch's functions alone."""
    run = torch.nn.functional

    def step(x, conv, norm, stride=1):
        x = run.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        return run.batch_norm(x, *(state[f"{norm}.{name}"] for name in names))

    x = run.relu(step(x, "conv1", "bn1"))
    for stage in (1, 2, 3):
        for i in range(len({n.split(".")[1] for n in state if n.startswith(f"layer{stage}.")})):
            block, stride = f"layer{stage}.{i}", 1 + (stage > 1 and i == 0)
            y = run.relu(step(x, f"{block}.conv1", f"{block}.bn1", stride))
            y = step(y, f"{block}.conv2", f"{block}.bn2")
            more = (y.shape[1] - x.shape[1]) // 2
            x = run.relu(y + run.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more, more)))
    return run.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def cifar(name, split):
    """Images of ../shared/data as the networks take them, and labels."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="reads ../shared/data")
    folder = next((SHARED / "data" / "tfds" / name).iterdir())
    source = tfds.builder_from_directory(folder).as_data_source(split=split)
    rows = [source[i] for i in range(len(source))]
    pixels = np.stack([row["image"] for row in rows]).astype(np.float32) / 255
    mean = np.array([[[[0.485, 0.456, 0.406]]]], np.float32)
    spread = np.array([[[[0.229, 0.224, 0.225]]]], np.float32)
    return (pixels - mean) / spread, np.array([row["label"] for row in rows])


@pytest.fixture(scope="module")
def images():
    if not (SHARED / "checkpoints/resnet_cifar10").is_dir():
        pytest.skip("needs ../shared with the CIFAR-10 images and networks")
    return cifar("cifar10_lossless", "train[:100]")


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks_predict_what_they_predict_in_torch(name, images):
    path = SHARED / "checkpoints/resnet_cifar10" / NETWORKS[name]
    pixels, labels = images
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    module, variables = mj.models.load(path)
    same(mj.models.to_torch(variables, {"architectures": [name]}, like=state), state)
    bare = {key.removeprefix("module."): x for key, x in state.items()}
    with torch.no_grad():
        theirs = torch_resnet(bare, torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()
    ours = np.asarray(jax.jit(module.apply)(variables, jnp.asarray(pixels)))
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert (ours.argmax(1) == labels).mean() > 0.99  # measured on 4,000: 99.8 to 100 %
