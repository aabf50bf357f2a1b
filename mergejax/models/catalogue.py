"""The architectures that can be built, by the names that config.json gives them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from mergejax.errors import MergeError, did_you_mean
from mergejax.models import bert, clip, gpt2, llama, resnet, t5, vit_layout
from mergejax.models.rules import Architecture, Config, Has, Shape, leaf_shapes, settings_of

ARCHITECTURES: dict[str, Architecture] = {
    name: architecture
    for family in (resnet, vit_layout, clip, bert, gpt2, llama, t5)
    for name, architecture in family.ARCHITECTURES.items()
}
_BY_TYPE = {
    "bert": "BertModel", "clip": "CLIPModel", "clip_text_model": "CLIPTextModel",
    "clip_vision_model": "CLIPVisionModel", "gpt2": "GPT2Model", "llama": "LlamaModel",
    "mistral": "MistralModel", "qwen2": "Qwen2Model", "roberta": "RobertaModel",
    "t5": "T5ForConditionalGeneration", "vit": "ViTModel",
}  # fmt: skip


class Model(NamedTuple):
    """An architecture with its settings.

    Attributes:
        name: of the architecture.
        architecture: its tables.
        settings: what the module is built from.
        module: the Flax module.
        leaves: shapes of its leaves by name, 'params/block_0/mlp_in/kernel'.
    """

    name: str
    architecture: Architecture
    settings: Config
    module: nn.Module
    leaves: Mapping[str, Shape]


def name_in(config: Mapping[str, Any]) -> str:
    """The architecture that a configuration names.

    Raises:
        MergeError: it names none, or one that is unknown.

    Example:
        >>> name_in({'model_type': 'bert'}), name_in({'architectures': ['resnet18']})
        ('BertModel', 'resnet18')
    """
    listed: Sequence[str] = config.get("architectures") or ()
    kind = config.get("model_type")
    if listed:
        if listed[0] in ARCHITECTURES:
            return listed[0]
        near = did_you_mean(listed[0], ARCHITECTURES)
        raise MergeError(f"the architecture {listed[0]} is unknown, {near}")
    if kind in _BY_TYPE:
        return _BY_TYPE[str(kind)]
    if kind is None:
        raise MergeError(
            "the config names neither architectures nor model_type; add for instance "
            '"architectures": ["BertModel"]'
        )
    raise MergeError(f"the model_type {kind!r} is unknown, {did_you_mean(str(kind), _BY_TYPE)}")


def model_of(config: Mapping[str, Any], has: Has | None = None) -> Model:
    """The model that a configuration describes.

    Args:
        config: config.json.
        has: whether the weights have a module, by PyTorch's name, for modules that are optional.

    Raises:
        MergeError: an unknown architecture, or a setting that cannot be built.
    """
    name = name_in(config)
    return _made(name, settings_of(ARCHITECTURES[name], config, has))


@functools.lru_cache(maxsize=32)
def _made(name: str, settings: Config) -> Model:
    architecture = ARCHITECTURES[name]
    module = architecture.module(settings)
    leaves = leaf_shapes(module, architecture.inputs(settings))
    return Model(name, architecture, settings, module, leaves)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The Flax module that a configuration describes.

    Args:
        config: config.json of `transformers`; for residual networks {'architectures': ['resnet50']}
            and, where it is not 1000 or 10, 'num_labels'.

    Returns:
        A linen module; `module.apply(variables, input_ids)`.

    Raises:
        MergeError: an unknown architecture, or a setting that cannot be built.

    Example:
        >>> type(build({'architectures': ['LlamaForCausalLM'], 'num_hidden_layers': 2})).__name__
        'LanguageModel'
    """
    architecture = ARCHITECTURES[name_in(config)]
    return architecture.module(settings_of(architecture, config))


def register(name: str, architecture: Architecture) -> None:
    """Adds an architecture, so that everything else here knows it.

    Args:
        name: what config.json calls it in `architectures`.
        architecture: its module and tables.

    Raises:
        MergeError: the name is taken.
    """
    if name in ARCHITECTURES:
        raise MergeError(f"there is an architecture '{name}' already; choose another name")
    ARCHITECTURES[name] = architecture
