"""Two vision transformers from different seeds, fused by transport and merged at several widths."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from mergejax import alignment, api, fit
from mergejax.alignment.structure import groups_of
from mergejax.alignment_studies import costs, networks, rating, transformers
from mergejax.collect import joint_gram
from mergejax.data.task import Task
from mergejax.errors import MergeError
from mergejax.progress import Reporter

Tree = Any
Record = dict[str, Any]
MERGED = "as merged"


def measure(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    folder: pathlib.Path,
    book: Reporter,
) -> list[Record]:
    """Accuracy of every merge of one seed, as it is merged and after some more steps.

    Args:
        config: `model` with `transformer` and `wider`, `training` of both and `training.tuned`,
            `alignment` with `budgets` and `examples`.
        tasks: the data; `config.model.transformer.task` says which one the networks learn.
        folder: where the trained networks are kept.
        book: told what is going on.

    Returns:
        Records of `pair` (what was done behind the merge), `method`, `cost` (multiplications of
        weights that are not zero, relative to one network) and `accuracy`.
    """
    name = config.model.transformer.task
    if name not in tasks:
        raise MergeError(
            f"config.model.transformer.task is '{name}', it must be one of config.data.tasks, "
            f"{tuple(tasks)}"
        )
    task = tasks[name]
    kinds = [("transformer", "a"), ("transformer", "b"), ("wider", "wide")]
    models = [networks.build(config.model[kind], len(task.labels)) for kind, _ in kinds]
    three = [
        networks.trained(
            model,
            task.train,
            fit.Settings(**config.training.transformer),
            [config.seed, place],
            folder / "checkpoints" / letter,
            book,
        )
        for place, ((_, letter), model) in enumerate(zip(kinds, models, strict=True))
    ]
    settings = fit.Settings(**config.training.tuned)
    first, right = models[0], rating.accuracy_of([task], shared=True)
    records: list[Record] = []

    def note(pair: str, found: Record, several: Sequence[Any]) -> None:
        records.append({"pair": pair, **found, "accuracy": right(several)})
        book.log(
            f"seed {config.seed}, {found['method']}, {pair}: "
            f"{100 * records[-1]['accuracy']:.1f} % at {found['cost']:.2f}"
        )

    for found, several in merges(models, three, task, config.alignment):
        note(MERGED, found, several)
        if all(model == first for model, _ in several):
            tuned = [
                (model, networks.train(model, one, task.train, settings, [config.seed, 9]))
                for model, one in several
            ]
            note(f"{settings.steps} steps later", found, tuned)
    return records


def merges(
    models: Sequence[Any],
    three: Sequence[Tree],
    task: Task,
    settings: Any,
) -> Iterator[tuple[Record, list[tuple[Any, Tree]]]]:
    """Every merge, as what is recorded of it and a list of (module, variables).

    Args:
        models: of the two networks and of a wider one.
        three: their variables.
        task: whose training images are read, without labels.
        settings: `budgets` of PLeaS, relative to one network, and number of `examples`.
    """
    model, pair = models[0], list(three[:2])
    images = task.train.inputs[: settings.examples]
    batches = networks.batches_of(images)
    apply = networks.function(model)
    symmetries = alignment.symmetries(apply.__wrapped__, pair[0], images[:2])
    joint = joint_gram(apply, pair, batches)
    once = rating.multiplications(model, pair[0], images[:1])

    def found(method: str, variables: Tree, **more: Any) -> Any:
        module = transformers.rebuilt(model, variables)
        spent = rating.multiplications(module, variables, images[:1]) / once
        return {"method": method, "cost": spent, **more}, [(module, variables)]

    def aligned(matching: alignment.Matching) -> Tree:
        moved = alignment.apply(symmetries, matching.permutations, pair[1])
        return api.merge("mean()", None, [pair[0], moved])

    yield found("first network", pair[0])
    yield found("second network", pair[1])
    yield found("average", api.merge("mean()", None, pair))
    yield found("weight matching", aligned(alignment.weight_matching(symmetries, *pair)))
    matching = alignment.activation_matching(symmetries, pair[0], pair[1], joint)
    yield found("activation matching", aligned(matching))
    weights = transformers.branch_weights(model, pair[0], images)
    for method, moved in fused(symmetries, pair, joint, weights):
        yield found(method, api.merge("mean()", None, [pair[0], moved]))
    spent = rating.multiplications(models[2], three[2], images[:1]) / once
    yield {"method": "wider network", "cost": spent}, [(models[2], three[2])]
    moved = narrowed(models, pair[0], three[2], symmetries, batches)
    yield found("transport, hard, wider to first", api.merge("mean()", None, [pair[0], moved]))
    times = rating.uses(model, pair[0], images[:1])
    for whole, kinds in ((symmetries, ""), (norms_apart(symmetries), ", norms apart")):
        for budget in settings.budgets:
            ratios = alignment.ratios_for(whole, pair[0], budget, uses=times)
            if kinds and not any(ratios.values()):
                continue  # as with one stream
            orders = alignment.keep_apart(whole, [matching], ratios)
            stats = alignment.statistics(whole, orders, pair)
            shared = alignment.regression(joint, stats, pair)
            for method, chain in (
                (f"joined{kinds}", "permute()|join()"),
                (f"PLeaS{kinds}", "pleas(ridge=1e-4)"),
            ):
                merged = api.merge(chain, None, pair, stats=stats, shared=shared)
                yield found(method, merged, budget=budget)
    yield {"method": "ensemble", "cost": 2.0}, [(model, one) for one in pair]


def stream_of(symmetries: alignment.Symmetries) -> str:
    """The group of the residual stream, which more leaves have than any other."""
    axes = symmetries.axes.values()
    return max(symmetries.groups, key=lambda name: sum(name in own for own in axes))


def norms_apart(symmetries: alignment.Symmetries) -> alignment.Symmetries:
    """Symmetries whose stream may be widened too: norms of `Transformer` can tell experts."""
    stream = stream_of(symmetries)
    free = dataclasses.replace(symmetries.groups[stream], widens=True)
    return dataclasses.replace(symmetries, groups={**symmetries.groups, stream: free})


def queries_apart(symmetries: alignment.Symmetries) -> alignment.Symmetries:
    """Symmetries in which the dimensions of queries have maps of their own, as published."""
    for leaf in [name for name in symmetries.axes if name.endswith("_query/kernel")]:
        _, shared = groups_of(symmetries.axes[leaf][1])  # heads, and what lies within
        both = [leaf, leaf.replace("kernel", "bias")]
        symmetries = alignment.apart(symmetries, shared, both)
    return symmetries


def fused(
    symmetries: alignment.Symmetries, pair: Sequence[Tree], joint: Mapping[str, Any], weights: Any
) -> Iterator[tuple[str, Tree]]:
    """The second network in the units of the first, by every kind of transport."""
    a, b = pair
    for name, seen, epsilon in (
        ("transport, hard", joint, 0.0),
        ("transport, soft", joint, None),
        ("transport by weights, hard", None, 0.0),
        ("transport by weights, soft", None, None),
    ):
        maps = alignment.optimal_transport(symmetries, a, b, joint=seen, epsilon=epsilon)
        yield name, alignment.transport(symmetries, maps, b)
    own = queries_apart(symmetries)
    maps = alignment.optimal_transport(own, a, b, joint=joint, epsilon=0.0)
    yield "transport, hard, queries apart", alignment.transport(own, maps, b)
    for name, residual in (*((n, n) for n in ("mean", "branch", "stream", "identity")),
                           ("weighted", weights)):  # fmt: skip
        for kind, epsilon in (("hard", 0.0), ("soft", None)):
            if kind == "soft" and name not in ("mean", "weighted"):
                continue
            cut, maps = alignment.layerwise_transport(
                symmetries, a, b, stream_of(symmetries), residual=residual, joint=joint,
                epsilon=epsilon,
            )  # fmt: skip
            yield f"transport by layer, {kind}, {name}", alignment.transport(cut, maps, b)


def narrowed(
    models: Sequence[Any],
    first: Tree,
    wide: Tree,
    symmetries: alignment.Symmetries,
    batches: Sequence[np.ndarray],
) -> Tree:
    """A wider network in the units of the first, by hard transport."""
    by_width = {model.width: networks.function(model).__wrapped__ for model in models}

    def apply(variables: Tree, images: np.ndarray) -> Any:
        return by_width[variables["params"]["norm"]["scale"].shape[0]](variables, images)

    own = alignment.symmetries(networks.function(models[2]).__wrapped__, wide, batches[0][:2])
    joint = joint_gram(apply, [first, wide], batches)
    maps = alignment.optimal_transport(symmetries, first, wide, own=own, joint=joint, epsilon=0.0)
    return alignment.transport(own, maps, wide)


def table(records: Sequence[Record]) -> str:
    """Accuracy and cost, mean ± spread over seeds, in Markdown."""
    return costs.table(records)


def picture(records: Sequence[Record]) -> Any:
    """Accuracy over multiplications, as merged and tuned."""
    curves = {
        "PLeaS, norms apart": "PLeaS, norms apart",
        "joined, norms apart": "the same units, no regression",
        "PLeaS": "PLeaS, one stream",
    }
    marks = ("average", "weight matching", "activation matching", "transport, hard",
             "transport, soft", "transport by layer, soft, mean", "first network",
             "ensemble")  # fmt: skip
    return costs.picture(records, curves, marks)
