"""Tied weights: an output and an embedding that are one matrix are merged as one leaf."""

import dataclasses

from mergejax.checkpoints.compare import same_values
from mergejax.checkpoints.files import Files
from mergejax.checkpoints.folder import Model
from mergejax.errors import raise_all

_NAMES = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight",
          "lm_head.weight", "predictions.decoder.weight")  # fmt: skip
_KEY = "tie_word_embeddings"


def as_one(model: Model, reference: Model | None = None) -> Model:
    """A model without the tensors that repeat its embedding, because they are tied to it.

    Tied is what has the same values, unless the configuration says that it is not. What the
    reference keeps apart is kept apart in the other models, too.

    Args:
        model: opened.
        reference: the model whose names the result takes; None for that model itself.

    Returns:
        The model; `twins` says which of its tensors stand for others.

    Raises:
        MergeError: values that differ although the configuration, or the reference, ties them.
    """
    alike = [name for end in _NAMES for name in model.tensors if name.endswith(end)]
    known = alike[:1] if reference is None else reference.tensors
    kept = [name for name in alike if name in known]
    repeats = [name for name in alike if name not in known]
    if not kept or not repeats or not (reference or model).config.get(_KEY, True):
        return model
    twins, problems = {}, []
    with Files() as files:
        for name in repeats:
            if same_values(model.tensors[kept[0]], model.tensors[name], files):
                twins[name] = kept[0]
            elif (reference or model).config.get(_KEY) or reference is not None:
                said = (
                    "its config.json ties them; set tie_word_embeddings to false there"
                    if reference is None
                    else f"'{reference.name}' has one tensor for both; give a base that has two"
                )
                problems.append(
                    f"'{model.name}' has other values in '{name}' than in '{kept[0]}', but {said}"
                )
    raise_all(problems)
    left = {name: tensor for name, tensor in model.tensors.items() if name not in twins}
    return dataclasses.replace(model, tensors=left, twins=twins)
