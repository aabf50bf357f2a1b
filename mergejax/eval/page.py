"""The report of a suite: one HTML page that needs no network, for a desk and for a phone."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from mergejax.eval import sections, seeds
from mergejax.eval.tables import label

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c6670; --line: #dfe3e6;
  --paper: #ffffff; --mark: #eef4f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaec; --soft: #a3adb5; --line: #3a4147;
  --paper: #16191c; --mark: #1f2b35; --accent: #6db6e3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem clamp(0.9rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
p, figcaption, .note { color: var(--soft); max-width: 46rem; }
.cards { display: grid; gap: 0.75rem; padding: 0; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); list-style: none; }
.cards li { border: 1px solid var(--line); border-radius: 0.6rem; padding: 0.7rem 0.9rem; }
.cards b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.cards span { color: var(--soft); font-size: 0.85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 0.6rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; width: 100%; }
th, td { padding: 0.35rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); max-width: 42vw; overflow: hidden; text-overflow: ellipsis; }
tbody tr:last-child td { border-bottom: 0; }
.words th, .words td { text-align: left; white-space: normal; }
tr.best td, tr.best td:first-child { background: var(--mark); font-weight: 600; }
tr.first td { border-top: 2px solid var(--soft); }
.pictures { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); align-items: start; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 0.6rem; padding: 0.75rem;
  background: #ffffff; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: #5c6670; font-size: 0.9rem; margin-bottom: 0.5rem; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
li { margin: 0.2rem 0; }
"""


def page(
    summary: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str]],
    more: Sequence[sections.Section] = (),
) -> str:
    """The whole page as text.

    Args:
        summary: what `seeds.summarise` returned.
        pictures: by file name a title and the PNG in base64.
        more: tables behind the large one.

    Returns:
        HTML with its style and its pictures inside.
    """
    merges = [row for row in summary["models"] if row["kind"] == "merge"]
    name = html.escape(summary["name"])
    figures = "\n".join(
        f'<figure><figcaption>{html.escape(title)}</figcaption><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{content}"></figure>'
        for title, content in pictures.values()
    )
    chains = "\n".join(
        f"<li>{html.escape(label(row))}: "
        + ", ".join(f"<code>{html.escape(chain)}</code>" for chain in row["chains"])
        + "</li>"
        for row in merges
    )
    tables = "\n".join(map(sections.page, more))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{name}</h1>
<p>{html.escape(_headline(summary, merges))}</p>
<ul class="cards">
{_cards(summary, merges)}
</ul>
<h2>Every model</h2>
<div class="scroll">
{_table(summary, merges)}
</div>
<p>{html.escape(seeds.caption(summary))}</p>
{tables}
<h2>Pictures</h2>
<div class="pictures">
{figures}
</div>
<h2>Chosen values</h2>
<ul>
{chains}
</ul>
</main>
</body>
</html>
"""


def _headline(summary: Mapping[str, Any], merges: Sequence[Mapping[str, Any]]) -> str:
    count = len(summary["seeds"])
    start = (
        f"{len(summary['tasks'])} tasks, {len(merges)} merges, "
        f"{count} {'seed' if count == 1 else 'seeds'}."
    )
    if not merges:
        return start
    best = merges[0]
    shown = seeds.shown(best["mean"])
    return f"{start} Best on validation examples: {label(best)}, {shown} % on test."


def _cards(summary: Mapping[str, Any], merges: Sequence[Mapping[str, Any]]) -> str:
    """The base, the average, the best merge and the upper marks at a glance."""
    rows = {row["name"]: row for row in summary["models"]}
    own = next(row for row in summary["models"] if row["kind"] == "own")
    wanted = [("base", rows["base"])]
    wanted += [("plain average", rows["average"])] if "average" in rows else []
    wanted += [(f"best merge: {label(merges[0])}", merges[0])] if merges else []
    wanted += [
        ("experts on their own tasks", own),
        ("ensemble", rows["ensemble"]),
        ("multi-task training", rows["multi_task"]),
    ]
    return "\n".join(
        f"<li><b>{seeds.shown(row['mean'])}</b><span>{html.escape(text)}</span></li>"
        for text, row in wanted
    )


def _table(summary: Mapping[str, Any], merges: Sequence[Mapping[str, Any]]) -> str:
    header, rows = seeds.cells(summary)
    best = merges[0]["name"] if merges else None
    lines, before = [], summary["models"][0]["kind"]
    for row, texts in zip(summary["models"], rows, strict=True):
        marks = [*(["best"] if row["name"] == best else []),
                 *(["first"] if row["kind"] != before else [])]  # fmt: skip
        before = row["kind"]
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        shown = f' class="{" ".join(marks)}"' if marks else ""
        lines.append(f"<tr{shown}>{cells}</tr>")
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in header)
    return (
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + ("\n</tbody>\n</table>")
    )
