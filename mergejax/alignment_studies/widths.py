"""Two residual networks for different tasks merged at widths from one to two (PLeaS)."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from mergejax import alignment, api, fit
from mergejax.alignment_studies import costs, networks, rating
from mergejax.collect import joint_gram
from mergejax.data.task import Split, Task
from mergejax.errors import MergeError
from mergejax.progress import Reporter

Tree = Any
Record = dict[str, Any]


def measure(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    folder: pathlib.Path,
    book: Reporter,
) -> list[Record]:
    """Accuracy of every merge of one seed.

    Args:
        config: `model`, `training`, and `alignment` with `pairs` (by name one task, whose classes
            are halved, or two with as many labels, the same ones or others), `budgets` and
            `examples`.
        tasks: the data.
        folder: where the trained networks are kept.
        book: told what is going on.

    Returns:
        Records of `pair`, `method`, `cost` (multiplications of weights that are not zero, relative
        to one network) and `accuracy`, the mean over both tasks.
    """
    records = []
    for name, members in config.alignment.pairs.items():
        both = parts(tasks, members)
        classes = len(both[0].labels)
        model = networks.build(config.model.residual, classes)
        assert isinstance(model, networks.Residual)
        pair = [
            networks.trained(
                model,
                task.train,
                fit.Settings(**config.training.residual),
                [config.seed, place],
                folder / "checkpoints" / f"{name}_{letter}",
                book,
            )
            for place, (letter, task) in enumerate(zip("ab", both, strict=True))
        ]
        examples, budgets = config.alignment.examples, config.alignment.budgets
        right = rating.accuracy_of(both, shared=both[0].labels == both[1].labels)
        for record in compare(model, pair, both, right, examples, budgets):
            records.append({"pair": name, **record})
            book.log(
                f"seed {config.seed}, {name}, {record['method']}: {100 * record['accuracy']:.1f} % "
                f"at {record['cost']:.2f}"
            )
    return records


def parts(tasks: Mapping[str, Task], members: Sequence[str]) -> list[Task]:
    """Two tasks: those named, or both halves of the classes of the only one."""
    unknown = [name for name in members if name not in tasks]
    if unknown or len(members) not in (1, 2):
        raise MergeError(
            f"config.alignment.pairs: {tuple(members)} must be one or two of config.data.tasks, "
            f"{tuple(tasks)}"
        )
    if len(members) > 1:
        labels = [len(tasks[name].labels) for name in members]
        if labels[0] != labels[1]:
            raise MergeError(
                f"config.alignment.pairs: {tuple(members)} have {labels[0]} and {labels[1]} "
                "labels; two tasks must have as many"
            )
        return [tasks[name] for name in members]
    whole = tasks[members[0]]
    half = len(whole.labels) // 2

    def chosen(split: Split, first: int) -> Split:
        mine = (split.labels >= first) & (split.labels < first + half)
        return Split(split.inputs[mine], split.labels[mine] - np.int32(first))

    return [
        Task(
            name=f"{whole.name}_{first}",
            labels=whole.labels[first : first + half],
            head=whole.head,
            **{p: chosen(getattr(whole, p), first) for p in ("train", "validation", "test")},
        )
        for first in (0, half)
    ]


def compare(
    model: networks.Residual,
    pair: Sequence[Tree],
    both: Sequence[Task],
    right: Callable[..., float],
    examples: int,
    budgets: Sequence[float],
) -> Iterator[Record]:
    """Merges two networks in all ways and rates them.

    Args:
        model: of both networks.
        pair: their variables.
        both: their tasks; half of the unlabelled images come from each.
        right: rates a list of (module, variables).
        examples: images for activations, regression and statistics.
        budgets: of PLeaS, relative to one network.
    """
    first, second = pair
    images = np.concatenate([task.train.inputs[: examples // 2] for task in both])
    images = np.random.default_rng(0).permutation(images)
    batches = networks.batches_of(images)
    apply = networks.function(model)
    symmetries = alignment.symmetries(apply.__wrapped__, pair[0], images[:2])
    joint = joint_gram(apply, pair, batches)
    weights = alignment.weight_matching(symmetries, first, second)
    matching = alignment.activation_matching(symmetries, first, second, joint)
    once = rating.multiplications(model, pair[0], images[:1])
    times = rating.uses(model, pair[0], images[:1])

    def rated(method: str, variables: Tree) -> Record:
        wide = networks.rebuilt(model, variables)
        found = networks.reestimated(wide, variables, batches)
        spent = rating.multiplications(wide, found, images[:1]) / once
        return {"method": method, "cost": spent, "accuracy": right([(wide, found)])}

    def chained(chain: str, orders: Sequence[Any], regressed: bool) -> Tree:
        stats = alignment.statistics(symmetries, orders, pair)
        shared = alignment.regression(joint, stats, pair) if regressed else None
        return api.merge(chain, None, list(pair), stats=stats, shared=shared)

    zipped = alignment.zip_units(symmetries, pair, joint)
    moved = [alignment.transport(symmetries, m, p) for m, p in zip(zipped, pair, strict=True)]
    aligned = "permute()|mean()"
    yield {"method": "first network", "cost": 1.0, "accuracy": right([(model, first)])}
    yield {"method": "second network", "cost": 1.0, "accuracy": right([(model, second)])}
    yield rated("average", api.merge("mean()", None, list(pair)))
    yield rated("Re-Basin", chained(aligned, [{}, weights.permutations], False))
    yield rated("activation matching", chained(aligned, [{}, matching.permutations], False))
    yield rated("ZipIt", api.merge("mean()", None, moved))
    for budget in budgets:
        ratios = alignment.ratios_for(symmetries, first, budget, scores=matching.scores, uses=times)
        orders = alignment.keep_apart(symmetries, [matching], ratios)
        joined = chained("permute()|join()", orders, False)
        yield {**rated("joined", joined), "budget": budget}
        yield {**rated("PLeaS", chained("pleas(ridge=1e-4)", orders, True)), "budget": budget}
    yield {"method": "ensemble", "cost": 2.0, "accuracy": right([(model, one) for one in pair])}
    # Merged networks have statistics of the images of both tasks.
    mixed = [(model, networks.reestimated(model, one, batches)) for one in pair]
    yield {"method": "ensemble, new statistics", "cost": 2.0, "accuracy": right(mixed)}


def table(records: Sequence[Record]) -> str:
    """Accuracy and cost, mean ± spread over seeds, in Markdown."""
    return costs.table(records)


def picture(records: Sequence[Record]) -> Any:
    """Accuracy over multiplications, one panel for each pair."""
    curves = {"PLeaS": "PLeaS", "joined": "the same units, no regression"}
    marks = ("average", "Re-Basin", "activation matching", "ZipIt", "ensemble",
             "ensemble, new statistics")  # fmt: skip
    return costs.picture(records, curves, marks)
