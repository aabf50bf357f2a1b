"""Merging checkpoints on disk, as whole processes: `python benchmarks/checkpoints.py --help`.

Makes a random Llama-shaped base and three experts, merges them with this library and, where it is
given, with mergekit, in turn; prints wall and processor time, peak memory of the process tree
(sampled in runs apart from the timed ones) and what `cp` of one model takes.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).parent.parent
NAMES = "abcdefgh"
Size = tuple[int, int, int, int]
SIZES: dict[str, Size] = {  # hidden, layers, MLP, vocabulary
    "full": (1024, 24, 2816, 32_000),
    "small": (256, 4, 704, 4_000),
}
# Ours and the peer's words for one method, and how many experts it takes.
METHODS = {
    "task arithmetic": ("task_arithmetic(scaling=0.5)", "task_arithmetic", {}, 3),
    "linear": ("linear()", "linear", {}, 3),
    "DARE": ("dare(rate=0.8)", "dare_linear", {"density": 0.2}, 3),
    "SLERP": ("slerp(t=0.5)", "slerp", {}, 2),
    "TIES, per tensor": (
        "ties(density=0.2, scope='tensor', zero='plus')",
        "ties",
        {"density": 0.2, "normalize": True},
        3,
    ),
    "TIES, whole model": ("ties(density=0.2)", None, {}, 3),
}


class Cost(NamedTuple):
    """Seconds on the clock and of processors; bytes resident and anonymous at the peak."""

    wall: float
    processor: float
    resident: int = 0
    anonymous: int = 0


def tensors(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama."""
    hidden, layers, wide, vocabulary = size
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        block = f"model.layers.{i}"
        for name in ("q", "k", "v", "o"):
            yield f"{block}.self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{block}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{block}.mlp.up_proj.weight", (wide, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, wide)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make(folder: pathlib.Path, size: Size, shards: int, experts: int = 3) -> None:
    """Writes a base and experts, bfloat16."""
    hidden, layers, wide, vocabulary = size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    shapes = dict(tensors(size))
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: names[i * shards // len(shapes)] for i, name in enumerate(shapes)}
    for number, model in enumerate(["base", *NAMES[:experts]]):
        target = folder / model
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps(config))
        index = {"metadata": {}, "weight_map": places}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        for file in names:
            own = {}
            for place, name in enumerate(shapes):
                if places[name] == file:
                    own[name] = draw(shapes[name], place, number)
            save_file(own, target / file, {"format": "pt"})


def draw(shape: tuple[int, ...], place: int, number: int) -> np.ndarray:
    """A tensor of the base, or of an expert that is a little off the base."""
    values = np.random.default_rng(place).standard_normal(shape, np.float32) * 0.02
    if number:
        noise = np.random.default_rng((place, number)).standard_normal(shape, np.float32)
        values += 0.002 * noise
    return values.astype(ml_dtypes.bfloat16)


def ours(folder: pathlib.Path, method: str, count: int, out: pathlib.Path) -> list[str]:
    """The command line of this library."""
    command = [sys.executable, "-m", "mergejax", "merge", "--quiet", "--base", str(folder / "base")]
    for name in NAMES[:count]:
        command += ["--expert", str(folder / name)]
    return [*command, "--method", method, "--out", str(out)]


def theirs(
    folder: pathlib.Path, program: str, name: str, settings: dict, count: int, out: pathlib.Path
) -> list[str]:
    """The command line of mergekit, whose configuration is written beside the models."""
    models = [{"model": str(folder / m), "parameters": {"weight": 0.5}} for m in NAMES[:count]]
    config: dict = {"merge_method": name, "models": models, "dtype": "bfloat16"}
    config |= {"parameters": dict(settings)} if settings else {}
    if name == "slerp":
        config |= {"base_model": str(folder / "a"), "parameters": {"t": 0.5}}
        config["models"] = [{"model": str(folder / m)} for m in "ab"]
    elif name != "linear":
        config["base_model"] = str(folder / "base")
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return [*shlex.split(program), str(path), str(out), "--no-copy-tokenizer", "--lazy-unpickle"]


def environment() -> dict[str, str]:
    """Of the processes: this library, its modules kept compiled as those of installed ones are."""
    kept = {n: x for n, x in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def timed(command: Sequence[str], out: pathlib.Path) -> Cost:
    """Runs a process and times it; what an interrupted one staged is continued."""
    shutil.rmtree(out, ignore_errors=True)
    before = os.times()
    started = time.perf_counter()
    silent = subprocess.DEVNULL
    subprocess.run(command, check=True, env=environment(), stdout=silent, stderr=silent)
    wall = time.perf_counter() - started
    after = os.times()
    used = after.children_user + after.children_system
    return Cost(wall, used - before.children_user - before.children_system)


def watched(command: Sequence[str], out: pathlib.Path) -> tuple[int, int]:
    """Peak resident and anonymous bytes of a process and all its children."""
    shutil.rmtree(out, ignore_errors=True)
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment(), stdout=silent, stderr=silent)
    peaks = [0, 0]
    while process.poll() is None:
        now = [0, 0]
        for number in family(process.pid):
            for i, value in enumerate(memory(number)):
                now[i] += value
        peaks = [max(a, b) for a, b in zip(peaks, now, strict=True)]
        time.sleep(0.005)
    return peaks[0], peaks[1]


def family(process: int) -> list[int]:
    """A process and its children."""
    found = [process]
    for number in found:
        try:
            for task in pathlib.Path(f"/proc/{number}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def memory(process: int) -> tuple[int, int]:
    """Resident and anonymous bytes of one process."""
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    held = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmR", "Rss"))
    }
    return int(held.get("VmRSS", 0)) * 1024, int(held.get("RssAnon", 0)) * 1024


def interrupted(command: Sequence[str], out: pathlib.Path, share: float) -> None:
    """Starts a merge and kills it when a share of the output is written."""
    shutil.rmtree(out, ignore_errors=True)
    staging = out.with_name(f".{out.name}.merging")
    shutil.rmtree(staging, ignore_errors=True)
    size = sum(path.stat().st_size for path in (out.parent / "base").glob("*.safetensors"))
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment(), stdout=silent, stderr=silent)
    while process.poll() is None:
        files = list((staging / "files").glob("*.safetensors"))
        if sum(path.stat().st_blocks * 512 for path in files) > share * size:
            process.kill()
            break
        time.sleep(0.002)
    process.wait()


def copied(folder: pathlib.Path, out: pathlib.Path) -> Cost:
    """What `cp` of one model takes."""
    return timed(["cp", "-r", str(folder / "base"), str(out)], out)


def measure(command: Sequence[str], out: pathlib.Path, runs: int) -> Cost:
    """The fastest of several runs, and the peaks of one more."""
    costs = [timed(command, out) for _ in range(runs)]
    fastest = min(costs)
    return Cost(fastest.wall, fastest.processor, *watched(command, out))


def main() -> None:
    """Makes the files, runs what was asked for, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where the files are made, or lie from an earlier run")
    parser.add_argument("--mergekit", help="command of the peer, such as venv/bin/mergekit-yaml")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument(
        "--resume",
        type=float,
        metavar="SHARE",
        help="kill merges when this share is written; processor time of whole and continued ones",
    )
    given = parser.parse_args()
    folder = pathlib.Path(given.folder or tempfile.mkdtemp(prefix="mergejax-benchmark-"))
    if not (folder / "base").is_dir():
        make(folder, SIZES[given.size], given.shards)
    model = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    out = folder / "out"
    cost = copied(folder, out)
    print(f"one model: {model / 1e6:.0f} MB; cp of it: {cost.wall:.2f} s")
    print("| method | who | wall s | processor s | resident MB | anonymous MB | GB/s |")
    print("|---|---|---|---|---|---|---|")
    for name in given.methods:
        method, peer, settings, count = METHODS[name]
        commands = {"mergejax": ours(folder, method, count, out)}
        if given.mergekit and peer:
            commands["mergekit"] = theirs(folder, given.mergekit, peer, settings, count, out)
        reads = count + (0 if name in ("linear", "SLERP") else 1)
        if given.resume:
            whole = timed(commands["mergejax"], out)
            interrupted(commands["mergejax"], out, given.resume)
            rest = timed(commands["mergejax"], out)
            share = rest.processor / whole.processor
            print(f"{name}: {whole.processor:.2f} s, continued {rest.processor:.2f} s, {share:.0%}")
            continue
        for who, command in commands.items():
            found = measure(command, out, given.runs)
            speed = (reads + 1) * model / 1e9 / found.wall
            print(
                f"| {name} | {who} | {found.wall:.2f} | {found.processor:.2f} | "
                f"{found.resident / 1e6:.0f} | {found.anonymous / 1e6:.0f} | {speed:.2f} |",
                flush=True,
            )
    if not given.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
