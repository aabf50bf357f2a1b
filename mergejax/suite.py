"""A suite: the main job with several seeds, and what they say together.

Every seed has a folder of its own in the workdir, `seed_0`, `seed_1`, ..., which is the workdir of
a run of the main job: it continues where it was interrupted, and nothing is measured twice. Behind
each seed the tables, the pictures and the page of the suite are written anew.
"""

import base64
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from mergejax import errors, experiment, workdir
from mergejax.checkpoints import fingerprint
from mergejax.eval import orders, page, published, sections, seeds

FILE = "suite.json"


def run(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    book: workdir.Logbook,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """Runs the seeds of a suite, or what of them the workdir does not hold yet.

    Args:
        config: of the main job, with `name` and `seeds`.
        folder: the workdir.
        book: told what is going on.
        origin: where the config comes from, as for `experiment.run`.

    Returns:
        What `summary.json` holds, see `seeds.summarise`, with `orders` (see `orders.summarise`)
        and `published` (see `published.compare`).

    Raises:
        MergeError: bad input, before anything is written; a workdir of another suite.
    """
    check(config, folder)
    found: dict[int, dict[str, Any]] = {}
    for place, seed in enumerate(config.seeds):
        book.log(f"seed {seed}, {place + 1} of {len(config.seeds)}")
        one = config.copy_and_resolve_references().unlock()
        one.seed = seed
        found[seed] = experiment.run(one.lock(), folder / f"seed_{seed}", book, origin)
        fingerprint.write_json(folder / FILE, {"name": config.name})
        summary = seeds.summarise(config.name, found)
        summary["published"] = published.compare(summary["models"], config.get("cells", {}))
        summary["orders"] = orders.summarise([one["orders"] for one in found.values()])
        _write(summary, found, folder)
    return summary


def check(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Refuses seeds that are no seeds, and the workdir of another suite or of a single run.

    Raises:
        MergeError: names what is wrong, also of cells that do not say everything.
    """
    published.check(config.get("cells", {}))
    problems = []
    distinct = len(set(config.seeds)) == len(config.seeds)
    if not config.seeds or not distinct or any(seed < 0 for seed in config.seeds):
        problems.append(
            f"config.seeds must be one or more different integers from 0, not {config.seeds}"
        )
    known = fingerprint.read_json(folder / FILE).get("name", config.name)
    if known != config.name:
        problems.append(
            f"{folder} holds results of the suite '{known}', not of '{config.name}'; choose "
            "another --workdir"
        )
    if (folder / workdir.RESULTS).is_dir():
        problems.append(f"{folder} holds a single run, not a suite; choose another --workdir")
    errors.raise_all(problems)


def closing(summary: Mapping[str, Any], folder: str) -> str:
    """The table, and the files to open.

    Args:
        summary: what `run` returned.
        folder: the workdir as the user wrote it.
    """
    header, rows = seeds.cells(summary)
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *rows)
    ]
    files = ", ".join(f"{folder}/results.{ending}" for ending in ("jsonl", "md", "tex"))
    return "\n".join([*lines, "", seeds.caption(summary), f"Open {folder}/report.html; {files}"])


def _write(
    summary: dict[str, Any], found: Mapping[int, dict[str, Any]], folder: pathlib.Path
) -> None:
    """Writes the numbers, the tables, the pictures and the page."""
    from mergejax.eval import seed_plots  # Matplotlib takes a second to import

    fingerprint.write_json(folder / "summary.json", summary)
    lines = [json.dumps(line) for line in seeds.lines(summary["name"], found)]
    workdir.write_text(folder / "results.jsonl", "\n".join(lines) + "\n")
    more = [
        kind.section(summary[name])
        for name, kind in (("orders", orders), ("published", published))
        if summary[name]
    ]
    text = "\n".join([seeds.markdown(summary), *map(sections.markdown, more)])
    workdir.write_text(folder / "results.md", text)
    workdir.write_text(folder / "results.tex", seeds.latex(summary))
    pictures: dict[str, tuple[str, str]] = {}
    for name, (title, figure) in seed_plots.draw(summary, found).items():
        content = io.BytesIO()
        figure.savefig(content, format="png")
        workdir.write_bytes(folder / name, content.getvalue())
        pictures[name] = (title, base64.b64encode(content.getvalue()).decode())
    workdir.write_text(folder / "report.html", page.page(summary, pictures, more))
