"""Workers on a graph that train alone and merge their neighbours' networks in between (DIMAT)."""

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mergejax import alignment, fit
from mergejax.alignment import dimat
from mergejax.alignment_studies import networks, tables, workers
from mergejax.data.task import Split, Task, joined
from mergejax.progress import Reporter

Tree = Any
Record = dict[str, Any]
SPLITS = ("IID", "non-IID")
METHODS: Mapping[str, Mapping[str, bool]] = {
    "average": {},
    "average, one start": {"one_start": True},
    "DIMAT": {"aligns": True},
    "DIMAT, shared images": {"aligns": True, "shares": True},
}


def measure(
    config: ml_collections.ConfigDict,
    tasks: Mapping[str, Task],
    folder: pathlib.Path,
    book: Reporter,
) -> list[Record]:
    """Accuracy over the rounds of one seed, for every split of the data, graph and way to merge.

    Args:
        config: `model.perceptron`, `training.perceptron` of each worker, and `alignment` with
            `workers`, `graphs`, `rounds`, and how examples are dealt out (`runs`).
        tasks: the data; `config.model.perceptron.task` says which one is learned.
        folder: not used, as networks are trained in the rounds.
        book: told what is going on.

    Returns:
        Records of `split`, `method`, `graph` and two lists over the rounds, the mean workers' test
        accuracy behind their merge (`merged`) and behind the training that follows (`trained`).
    """
    with contextlib.suppress(RuntimeError):  # JAX has started; `mesh_of` says if that is too late
        jax.config.update("jax_num_cpu_devices", config.alignment.workers)
    settings = config.model.perceptron
    task, asked = tasks[settings.task], config.alignment
    train, test = (
        Split(workers.grey(part.inputs), part.labels) for part in (task.train, task.test)
    )
    model = networks.build(settings, len(task.labels))
    records = []
    for split in SPLITS:
        parts = workers.divided(train, asked.workers, asked.runs[split], config.seed)
        todo = list(plans(asked.graphs))
        with book.progress(f"seed {config.seed}, {split}", len(todo)) as advance:
            for method, graph in todo:
                found = run(model, method, graph, parts, test, config)
                records.append({"split": split, "method": method, "graph": graph, **found})
                advance(1)
    return records


def plans(graphs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is compared: methods, each on every graph."""
    yield from (("central", ""), ("alone", ""))
    yield from ((method, graph) for method in METHODS for graph in graphs)


def run(
    model: nn.Module,
    method: str,
    graph: str,
    parts: Sequence[Split],
    test: Split,
    config: ml_collections.ConfigDict,
) -> Record:
    """Trains and merges for all rounds; accuracies behind each merge and each training.

    Central training is one worker with all examples and a batch as large as all workers' together.
    """
    asked, training, seed = config.alignment, config.training.perceptron, config.seed
    batch = training.batch
    if method == "central":
        batch, parts = batch * len(parts), [functools.reduce(joined, parts)]
    mesh = dimat.mesh_of(len(parts))
    generator = np.random.default_rng([seed, 2])
    keys = jax.random.split(jax.random.key(seed), len(parts))
    facts = METHODS.get(method, {})
    keys = keys[np.zeros(len(parts), int)] if facts.get("one_start") else keys
    nets = jax.vmap(lambda key: model.init(key, test.inputs[:2]))(keys)

    def trained(nets: Tree, steps: int) -> Tree:
        batches = [fit.draw([part], steps, batch, generator) for part in parts]
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
        return workers.train(nets, stacked, jnp.float32(training.learning_rate), model, mesh)

    nets = trained(nets, training.start)
    images = [part.inputs[: asked.examples] for part in parts]
    if facts.get("shares"):
        images = len(parts) * [np.concatenate(images)[:: len(parts)]]
    merge = _merger(model, facts, graph, nets, np.stack(images), mesh)
    merged, after = [], []
    for _ in range(asked.rounds):
        nets = merge(nets)
        merged.append(workers.accuracy(nets, test, model, mesh))
        nets = trained(nets, training.steps)
        after.append(workers.accuracy(nets, test, model, mesh))
    return {"merged": merged, "trained": after}


def _merger(
    model: nn.Module,
    facts: Mapping[str, bool],
    graph: str,
    nets: Tree,
    images: np.ndarray,
    mesh: Mesh,
) -> Callable[[Tree], Tree]:
    """What workers do between their trainings."""
    if not graph:
        return lambda nets: nets
    edges = dimat.senders(graph, mesh.size)
    if not facts.get("aligns"):
        return lambda nets: dimat.average_neighbours(nets, edges, mesh)
    apply = networks.function(model)
    first = jax.tree.map(lambda x: x[0], nets)
    symmetries = alignment.symmetries(apply.__wrapped__, first, images[0, :2])
    return lambda nets: dimat.merge_neighbours(symmetries, apply, nets, images, edges, mesh)


def table(records: Sequence[Record]) -> str:
    """Accuracy behind the first and the last merge and the last training, in Markdown."""
    splits = list(dict.fromkeys(r["split"] for r in records))
    rows = []
    for method, graph in dict.fromkeys((r["method"], r["graph"]) for r in records):
        cells = []
        for split in splits:
            mine = [r for r in records
                    if (r["method"], r["graph"], r["split"]) == (method, graph, split)]  # fmt: skip
            for name, place in (("merged", 0), ("merged", -1), ("trained", -1)):
                cells.append(tables.spread([r[name][place] for r in mine]))
        rows.append([method, graph, *cells])
    columns = ("first merge", "last merge", "trained")
    return tables.markdown(
        ["method", "graph", *(f"{split}, {name}" for split in splits for name in columns)], rows
    )


def picture(records: Sequence[Record]) -> Any:
    """Accuracy behind every merge, a row of panels for each split, a column for each graph."""
    from matplotlib import figure

    from mergejax.eval.plots import BLUE, DARK, GREY, ORANGE

    splits = list(dict.fromkeys(r["split"] for r in records))
    graphs = [graph for graph in dict.fromkeys(r["graph"] for r in records) if graph]
    styles = {
        "central": (DARK, ":"), "alone": (GREY, ":"), "average": (ORANGE, "-"),
        "average, one start": (ORANGE, "--"), "DIMAT": (BLUE, "-"),
        "DIMAT, shared images": (BLUE, "--"),
    }  # fmt: skip
    size = (3.2 * len(graphs), 2.7 * len(splits) + 0.5)
    canvas = figure.Figure(figsize=size, dpi=150, layout="constrained")
    panels = canvas.subplots(len(splits), len(graphs), squeeze=False, sharex=True, sharey="row")
    for (row, split), (column, graph) in itertools.product(enumerate(splits), enumerate(graphs)):
        axes = panels[row][column]
        for method, (colour, style) in styles.items():
            found = np.array([
                r["merged"] for r in records
                if (r["split"], r["method"]) == (split, method) and r["graph"] in ("", graph)
            ])  # fmt: skip
            if not len(found):
                continue
            rounds, mean, width = np.arange(1, found.shape[1] + 1), found.mean(0), found.std(0)
            low, high = 100 * (mean - width), 100 * (mean + width)
            axes.plot(rounds, 100 * mean, style, color=colour, linewidth=1.5, label=method)
            axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(f"{graph}, {split}", fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("round" if row == len(splits) - 1 else "", fontsize=9)
        axes.set_ylabel("" if column else "test accuracy in %", fontsize=9)
    handles = panels[0][0].get_lines()
    canvas.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return canvas
