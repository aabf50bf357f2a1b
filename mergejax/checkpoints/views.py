"""The models of a merge as its plans see them: rows by token, layers by range."""

from collections.abc import Sequence

from mergejax.checkpoints import layers, vocabulary
from mergejax.checkpoints.folder import Model
from mergejax.checkpoints.request import Request
from mergejax.errors import raise_all


def seen_through_plans(
    request: Request, models: Sequence[Model]
) -> tuple[Model | None, list[Model], list[str]]:
    """Base and experts with rows that stand for the same tokens and with the layers asked for.

    Returns:
        The base, or None; the experts; what was done, in sentences.

    Raises:
        MergeError: vocabularies or layers that do not fit.
    """
    notes: list[str] = []
    reference = models[0]
    if request.vocabulary != "error":
        models, notes = vocabulary.align(models, request.vocabulary)
    elif len({vocabulary.row_count(model) for model in models}) == 1:
        raise_all(vocabulary.moved(reference, models))
    base, experts = (None, models) if request.base is None else (models[0], models[1:])
    if not request.layers:
        return base, list(experts), notes
    paths = [*request.experts, *([] if request.base is None else [request.base])]
    order = [*experts, *([] if base is None else [base])]
    given = {str(path): model for path, model in reversed(list(zip(paths, order, strict=True)))}
    base, experts, more = layers.stack(base, experts, request.layers, given)
    return base, experts, [*notes, *more]
