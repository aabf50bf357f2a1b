"""Gram matrices of converted models against those of the same activations in PyTorch."""

import numpy as np
import pytest

import mergejax as mj

torch = pytest.importorskip("torch", reason="PyTorch is the reference; pip install torch")
transformers = pytest.importorskip("transformers", reason="has the reference model")

from torch_resnet import make  # noqa: E402

VIT = {"image_size": 12, "patch_size": 4, "hidden_size": 12, "num_hidden_layers": 2,
       "num_attention_heads": 3, "intermediate_size": 20, "num_labels": 4}  # fmt: skip


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VIT)
    make_model = transformers.ViTForImageClassification._from_config
    model = make_model(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model, config.to_dict() | {"architectures": ["ViTForImageClassification"]}


def resnet():
    return make("resnet20", 4), {"architectures": ["resnet20"], "num_labels": 4}


def by_hand(model, images):
    """{name of a weight: mean Gram matrix} of the inputs of Linear and Conv2d, in float64."""
    found = {}

    def look(name):
        def hook(module, inputs):
            x = inputs[0]
            if isinstance(module, torch.nn.Conv2d):  # patches, channel first
                size, options = module.kernel_size, (1, module.padding, module.stride)
                x = torch.nn.functional.unfold(x, size, *options).transpose(1, 2)
            x = x.reshape(-1, x.shape[-1])
            found[f"{name}.weight"] = (x.T @ x / len(x)).numpy()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        model.double()(torch.from_numpy(images).double())
    return found


@pytest.mark.parametrize(("kind", "size", "layers"), [(vit, 12, 14), (resnet, 10, 20)])
def test_gram_matrices_are_those_of_the_activations_in_torch(kind, size, layers):
    model, config = kind()
    images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    module, variables = mj.models.from_torch(model.state_dict(), config)
    plan = mj.models.transfer.plan_of(model.state_dict(), config)
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def apply(params, batch):
        return module.apply({"params": params, **rest}, batch)

    grams = mj.collect.gram(apply, variables["params"], [images])
    expected = by_hand(model, images.transpose(0, 3, 1, 2))
    names = {name: plan.given[plan.places[f"params/{name}"].name] for name in grams}
    assert sorted(names.values()) == sorted(expected)
    assert len(expected) == layers
    for name, found in grams.items():
        wanted = expected[names[name]]
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max(), name
