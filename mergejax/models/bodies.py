"""The bodies that a config can ask for by `model.kind`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mergejax import errors
from mergejax.models import residual, sentence, vit

KINDS: Mapping[str, Callable[..., nn.Module]] = {
    "vit": vit.VisionTransformer,
    "resnet": residual.ResidualNetwork,
    "sentence_encoder": sentence.build,
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
    if settings.get("kind") == "sentence_encoder":
        return sentence.pretrained(settings["weights"])
    return None


def mask(model: nn.Module) -> Callable[[Any], Any] | None:
    """What says which tokens of a batch are no padding; None for models of images."""
    return getattr(model, "mask", None)
