"""The bodies that a config can ask for by `model.kind`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from mergejax import errors
from mergejax.models import residual, sentence, vit, zero_shot

KINDS: Mapping[str, Callable[..., nn.Module]] = {
    "vit": vit.VisionTransformer,
    "resnet": residual.ResidualNetwork,
    "sentence_encoder": sentence.build,
    "clip": zero_shot.build,
}


def build(settings: Mapping[str, Any]) -> nn.Module:
    """Makes the module of a body: images or tokens, [n, ...], to features [n, width].

    Args:
        settings: `kind`, one of `KINDS` ('vit' if absent), and the arguments of that module; lists
            count as tuples, because JSON knows no others.

    Returns:
        The module.

    Raises:
        MergeError: an unknown kind.
        TypeError: arguments that the module does not have.

    Example:
        >>> build({"kind": "resnet", "widths": [8, 16], "blocks": 1}).widths
        (8, 16)
    """
    kind = str(settings.get("kind", "vit"))
    if kind not in KINDS:
        raise errors.MergeError(
            f"config.model.kind: there is no model '{kind}', {errors.did_you_mean(kind, KINDS)}"
        )
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name != "kind"
    }
    return KINDS[kind](**arguments)


def pretrained(settings: Mapping[str, Any]) -> Any:
    """The parameters that a body comes with, or None for those that are trained from scratch.

    Args:
        settings: as for `build`.

    Raises:
        MergeError: weights that cannot be read.

    Example:
        >>> pretrained({"kind": "vit"}) is None
        True
    """
    match settings.get("kind"):
        case "sentence_encoder":
            return sentence.pretrained(settings["weights"])
        case "clip":
            return zero_shot.pretrained(settings["weights"])
    return None


def heads(
    settings: Mapping[str, Any], sentences: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, Any]:
    """The heads that a model makes of sentences about the classes; none of no sentences.

    Args:
        settings: as for `build`.
        sentences: by head, for each class, as `data.sentences` gives them.

    Example:
        >>> heads({"kind": "vit"}, {})
        {}
    """
    return zero_shot.heads(settings["weights"], sentences) if sentences else {}


def expert(settings: Mapping[str, Any], task: str) -> Any:
    """The parameters of a fine-tuned model that the settings name, or None where it is to be made.

    Args:
        settings: as for `build`; `experts` says where fine-tuned models are.
        task: whose expert.

    Raises:
        MergeError: weights that cannot be read, or of another shape.

    Example:
        >>> expert({"kind": "vit"}, "mnist") is None
        True
    """
    if not settings.get("experts", ""):
        return None
    return zero_shot.expert(settings["weights"], settings["experts"], task)


def mask(model: nn.Module) -> Callable[[Any], Any] | None:
    """What says which tokens of a batch are no padding; None for models of images."""
    return getattr(model, "mask", None)
