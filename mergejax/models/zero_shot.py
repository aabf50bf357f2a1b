"""CLIP as a classifier: the image encoder is a body, its heads are sentences about the classes."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mergejax.checkpoints import hub
from mergejax.errors import MergeError, some
from mergejax.models import folders
from mergejax.models.clip import Clip, TextEncoder, VisionEncoder
from mergejax.models.rules import Config

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in CLIP's training images
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
CHUNK = 256  # sentences that go through the text encoder at once


class ImageEncoder(nn.Module):
    """Images to directions in the space that CLIP shares with texts."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [n, height, width, 3], bytes or floats in [0, 1], to [n, width] of length one."""
        c = self.config
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        mean, deviation = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (MEAN, DEVIATION))
        normal = (images - mean) / deviation
        _, pooled = VisionEncoder(c.vision_config, name="vision")(normal)
        return _direction(nn.Dense(c.projection_dim, use_bias=False, name="projection")(pooled))


def _direction(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def _loaded(weights: str) -> tuple[pathlib.Path, Config, Any]:
    """The folder, the settings and the parameters of a whole CLIP; read once."""
    path = hub.find(pathlib.Path(weights))
    module, variables = folders.load(path)
    if not isinstance(module, Clip):
        raise MergeError(
            f"config.model.weights: {weights} is a {type(module).__name__}, where a CLIPModel with "
            "both of its encoders is expected"
        )
    return path, module.config, variables["params"]


def build(weights: str, experts: str = "") -> nn.Module:
    """The module of CLIP's image encoder with its projection.

    Args:
        weights: a folder or a name on the Hub of a CLIPModel.
        experts: see `expert`.

    Raises:
        MergeError: no such weights, or of another architecture.
    """
    return ImageEncoder(_loaded(weights)[1])


def pretrained(weights: str) -> Any:
    """The parameters of `build`'s module, NumPy arrays.

    Raises:
        MergeError: as `build`.
    """
    params = _loaded(weights)[2]
    return {"vision": params["vision"], "projection": params["vision_projection"]}


def expert(weights: str, experts: str, task: str) -> Any:
    """The parameters of a fine-tuned image encoder; those that its file lacks are the base's.

    Args:
        weights: the base, as for `build`.
        experts: folders or names on the Hub, with `{task}` for the name of the task.
        task: whose expert.

    Raises:
        MergeError: no such weights, or not of the base's shapes.
    """
    name = experts.format(task=task)
    module, variables = folders.load(hub.find(pathlib.Path(name)))
    params = variables["params"]
    if isinstance(module, VisionEncoder):
        params = {"vision": params}
    base = pretrained(weights)
    found = {"vision": params.get("vision", {})}
    projection = params.get("vision_projection", params.get("projection", base["projection"]))
    found["projection"] = projection
    shapes, wanted = (
        {leaf: np.shape(x) for leaf, x in traverse_util.flatten_dict(tree, sep="/").items()}
        for tree in (found, base)
    )
    if shapes != wanted:
        other = sorted(
            leaf for leaf in wanted.keys() | shapes if shapes.get(leaf) != wanted.get(leaf)
        )
        raise MergeError(
            f"config.model.experts: {name} is no expert of {weights}, its shapes differ in "
            f"{some(other)}; give models that were fine-tuned from config.model.weights"
        )
    return found


def heads(weights: str, sentences: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, Any]:
    r"""Heads that score an image by its cosine with what CLIP makes of sentences.

    For class c with the sentences :math:`S_c` and the text encoder g

    .. math:: w_c = s \frac{m_c}{\lVert m_c\rVert},\quad
        m_c = \frac1{|S_c|}\sum_{t \in S_c} \frac{g(t)}{\lVert g(t)\rVert}

    with CLIP's own scale s.

    Args:
        weights: as for `build`; the folder holds tokenizer.json.
        sentences: by head, for each class.

    Returns:
        By head a kernel [width, classes] and a bias [classes] of zeros, float32.

    Raises:
        MergeError: no such weights or tokenizer; a package that is not installed.

    Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.
    """
    path, config, params = _loaded(weights)
    flat = [text for classes in sentences.values() for several in classes for text in several]
    tokens = _tokens(path, flat, config.text_config.max_position_embeddings)
    encoder = TextEncoder(config.text_config)

    @jax.jit
    def encode(tokens: jax.Array) -> jax.Array:
        _, ends = encoder.apply({"params": params["text"]}, tokens)
        return _direction(ends @ params["text_projection"]["kernel"])

    parts = [encode(tokens[i : i + CHUNK]) for i in range(0, len(tokens), CHUNK)]
    rows = iter(np.concatenate(parts)) if parts else iter(())
    found = {}
    for head, classes in sentences.items():
        means = [np.mean([next(rows) for _ in several], axis=0) for several in classes]
        kernel = np.exp(params["logit_scale"]) * _direction(jnp.stack(means)).T
        found[head] = {"kernel": kernel, "bias": jnp.zeros(len(classes), kernel.dtype)}
    return found


def _tokens(path: pathlib.Path, texts: Sequence[str], length: int) -> np.ndarray:
    """Tokens of texts, int32 [n, length]; what follows the end of a text repeats its last token."""
    try:
        from tokenizers import Tokenizer  # here, because only these heads need it
    except ImportError as error:
        raise MergeError(
            f"the heads of CLIP need a package that is not installed ({error}): "
            "run pip install 'mergejax[texts]'"
        ) from error
    file = path / "tokenizer.json"
    if not file.is_file():
        raise MergeError(f"{path}: there is no tokenizer.json, which the texts are cut by")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    ids = [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]
    return np.array([row + (length - len(row)) * row[-1:] for row in ids], np.int32)
