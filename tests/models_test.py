"""Every architecture against transformers: logits, parameters, and every bit there and back."""

import jax
import pytest

import mergejax as mj

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
pytest.importorskip("transformers", reason="transformers is the reference")

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
