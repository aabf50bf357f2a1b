"""How a merge on disk grows, and how good its forecast is: `python benchmarks/growth.py --help`.

Every row is a merge of files that are made for it and deleted afterwards, as a whole process:
what `mergejax check` says beforehand, and what was measured. Time and memory are of runs apart.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

import checkpoints


class Row(NamedTuple):
    """Files of one shape: hidden, layers, MLP, vocabulary; experts; shards; a method; a budget."""

    shape: tuple[int, int, int, int]
    experts: int = 3
    shards: int = 2
    method: str = "task_arithmetic(scaling=0.5)"
    memory: str | None = None


NARROW = (512, 12, 1408, 8_000)
TIES, WHOLE = "ties(density=0.2, scope='tensor', zero='plus')", "ties(density=0.2)"
TABLES = {
    "parameters": [Row((512, layers, 1408, 8_000)) for layers in (12, 24, 48)],
    "experts": [Row(NARROW, experts=n) for n in (2, 4, 8)],
    "shards": [Row(NARROW, shards=n) for n in (2, 8, 16)],
    "ties": [Row((512, n, 1408, 8_000), method=WHOLE) for n in (12, 24, 48)],
    "methods": [
        Row(checkpoints.SIZES["full"], 2 if method.startswith("slerp") else 3, method=method)
        for method in ("linear()", "task_arithmetic(scaling=0.5)", "dare(rate=0.8)",
                       "slerp(t=0.5)", TIES, WHOLE)
    ],
    "large": [
        Row((2048, 18, 5632, 32_000), shards=4, method=method, memory="1GiB")
        for method in ("task_arithmetic(scaling=0.5)", WHOLE)
    ],
}  # fmt: skip


def check(command: list[str]) -> dict:
    """The forecast of a merge."""
    command = [word for word in command if word != "--quiet"]
    command[command.index("merge")] = "check"
    answer = subprocess.run([*command, "--json"], capture_output=True, check=True, text=True)
    return json.loads(answer.stdout)["forecast"]


def run(row: Row, folder: pathlib.Path, runs: int) -> list[str]:
    """The cells of one row."""
    out = folder / "out"
    command = checkpoints.ours(folder, row.method, row.experts, out)
    command += ["--memory", row.memory] if row.memory else []
    shutil.rmtree(out, ignore_errors=True)
    told = check(command)
    cost = checkpoints.measure(command, out, runs)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    model = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    return [
        f"{model / 2e6:.0f} M",
        f"{row.shape[1]}",
        f"{row.experts}",
        f"{row.shards}",
        row.method.partition("(")[0] + (" per tensor" if "scope" in row.method else ""),
        f"{told['passes']}",
        f"{cost.wall:.2f}",
        f"{told['seconds'] / cost.wall:.2f}",
        f"{cost.processor:.2f}",
        f"{cost.anonymous / 1e6:.0f}",
        f"{told['memory_bytes'] / cost.anonymous:.2f}",
        f"{told['disk_bytes'] / written:.4f}",
    ]


def main() -> None:
    """Runs the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="+", choices=TABLES)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", help="where the files are made; a temporary folder by default")
    given = parser.parse_args()
    print(
        "| parameters | layers | experts | shards | method | passes | wall s | forecast / wall "
        "| processor s | anonymous MB | forecast / anonymous | forecast / disk |"
    )
    print("|---" * 12 + "|")
    for name in given.tables:
        before: Row | None = None
        folder = pathlib.Path(tempfile.mkdtemp(prefix="mergejax-growth-", dir=given.folder))
        for row in TABLES[name]:
            made = before and (before.shape, before.shards) == (row.shape, row.shards)
            if not (made and before and row.experts <= before.experts):
                shutil.rmtree(folder)
                checkpoints.make(folder, row.shape, row.shards, row.experts)
                before = row
            print(f"| {' | '.join(run(row, folder, given.runs))} |", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
