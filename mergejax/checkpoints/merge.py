"""Merges checkpoints from disk to disk: staged, resumable, verified, the same bytes every time."""

import contextlib
import copy
import json
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mergejax import errors
from mergejax.checkpoints import adapter_merge, budget, folder, output, target
from mergejax.checkpoints.execute import (
    Memory,
    execute,
    in_order,
    input_bytes,
    key_of,
    parts_of,
    recall,
    verify,
)
from mergejax.checkpoints.files import HASH, Files
from mergejax.checkpoints.folder import Model
from mergejax.checkpoints.job import Job, prepare
from mergejax.checkpoints.pieces import Runner, Work
from mergejax.checkpoints.request import make_request, show_size
from mergejax.checkpoints.staging import Staging
from mergejax.checkpoints.works import make_works
from mergejax.progress import Reporter, Silent
from mergejax.randomness import name_key

_SYNC = 0.1  # seconds between two times that what was written is put on the disk


def merge_checkpoints(
    method: Any,
    base: str | os.PathLike | None,
    experts: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    reporter: Reporter | None = None,
    **options: Any,
) -> pathlib.Path:
    """Merges models on disk into a new folder, in bounded memory.

    Reading, arithmetic (in float32) and writing overlap. The result is staged beside `out` and
    appears there by one renaming; the same call after an interruption continues and ends with the
    same bytes. Inputs are never changed. Threads take turns at the devices that there are.

    Args:
        method: a chain (`mj.ties(density=0.2)`) or a text ('drop(rate=0.9)|ties()').
        base: Hugging Face folder or safetensors file that the experts were fine-tuned from; its
            names, types, settings and tokenizer are the result's. None for methods on weights,
            which then take them from the first expert.
        experts: folders or files. Adapters of PEFT go with their base; without one, adapters alone
            are merged into an adapter by a method of `mergejax.lowrank`, such as 'svd(rank=8)'.
        out: the folder to write.
        reporter: told what is going on; silent by default.
        **options: `weights`, `dtype`, `seed`, `memory`, `shard_size`, `overwrite`, `only`,
            `exclude`, `strict`, see `mergejax.checkpoints.request.Request`.

    Returns:
        The folder that was written.

    Raises:
        MergeError: (a ValueError) one sentence for each problem of the inputs or the options.
            Nothing is left behind.
        OSError: the disk is full or broken; what was done so far is kept for the next call.

    Example:
        >>> import tempfile, numpy as np, mergejax as mj
        >>> from safetensors.numpy import load_file, save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({'w': np.zeros(2, np.float32)}, f'{folder}/base.safetensors')
        >>> save_file({'w': np.ones(2, np.float32)}, f'{folder}/expert.safetensors')
        >>> out = mj.merge_checkpoints('task_arithmetic(scaling=0.5)', f'{folder}/base.safetensors',
        ...                            [f'{folder}/expert.safetensors'], f'{folder}/merged')
        >>> print(load_file(out / 'model.safetensors')['w'])
        [0.5 0.5]
    """
    request = make_request(base, experts, method, out, **options)
    if request.out is None:
        raise errors.MergeError("there is no output; name a folder to write")
    if adapter_merge.applies(request):
        adapter_merge.run(request, reporter or Silent())
        return request.out
    job, problems, _ = prepare(request)
    errors.raise_all(problems.sentences())
    assert job is not None
    run(job, reporter or Silent())
    return request.out


def run(job: Job, reporter: Reporter) -> None:
    """Does what a job describes.

    Raises:
        MergeError: bad values, an occupied target.
        OSError: a full or broken disk.
    """
    out = job.request.out
    assert out is not None
    for line in job.warnings:
        reporter.log(f"warning: {line}")
    for line in job.notes:
        reporter.log(line)
    if not target.is_free(out) and _is_done(job):
        reporter.log(f"{out} holds this very merge already; nothing to do")
        return
    errors.raise_all(target_problems(job))
    staging = Staging(out)
    with staging:
        try:
            _merge(job, staging, reporter)
        except errors.MergeError:
            staging.remove()
            raise
        except OSError as error:
            error.add_note(f"what was done is kept in {staging.folder}")
            raise


def target_problems(job: Job) -> list[str]:
    """Why the merge cannot be begun now: too little memory, a target that cannot be written."""
    out = job.request.out
    if out is None:
        return []
    every = make_works(job, output.place(job.files, out, job.recipe))
    if too_little := budget.problems(job, every):
        return too_little
    problems = target.problems(out, job.request.overwrite)
    return [] if problems and not target.is_free(out) and _is_done(job) else problems


def _merge(job: Job, staging: Staging, reporter: Reporter) -> None:
    lines = staging.resume(_identity(job))
    if lines:
        reporter.log(f"continuing from {staging.folder}")
    started = time.monotonic()
    works = make_works(job, output.place(job.files, staging.files, job.recipe))
    names = np.array([name_key(expert.name) for expert in job.experts], np.uint32)
    runner = Runner(job.reads_base, names, job.request.seed)
    memory = recall(lines)
    count = budget.threads(job, budget.need(job, works))
    passes = 1 + len(job.plan.passes)
    total = sum(input_bytes(part) for part in parts_of(works))
    try:
        several = f"{passes} passes" if passes > 1 else "1 pass"
        title = f"{several} over {len(works)} tensors, {show_size(total)}"
        with _synced(runner.outputs):
            with reporter.progress(title, passes * len(parts_of(works))) as advance:
                execute(job.plan, works, runner, staging, memory, count, advance)
            recipe = _with_hashes(job, works, memory.digests)
            output.write_headers(job.files, staging.files, recipe, runner.outputs)
            verify(works, runner, memory, count)
    finally:
        runner.close()
    result = _result_hash(works, memory.done)
    output.write_sides(job.reference, job.parents, staging.files, recipe, result)
    staging.publish()
    seconds = time.monotonic() - started
    moved = total + output.file_bytes(job.files, job.recipe)
    reporter.log(
        f"{job.request.out}: {len(works)} tensors of {len(job.experts)} experts in "
        f"{seconds:.1f} s, {moved / 1e9 / seconds:.1f} GB/s"
    )


@contextlib.contextmanager
def _synced(outputs: Files) -> Iterator[None]:
    """Has files put on the disk while they are written, and waits for the rest of them."""
    written = threading.Event()

    def sync() -> None:
        while not written.wait(_SYNC):
            outputs.sync()
        outputs.sync()

    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(sync)
        try:
            yield
        finally:
            written.set()
        synced.result()


def _identity(job: Job) -> dict[str, Any]:
    """What must be the same for an interrupted merge to be continued."""
    sources = [[str(model.path.resolve()), sorted(_files(model))] for model in job.parents]
    sizes = [[os.stat(file).st_size for file in files] for _, files in sources]
    return {"recipe": job.recipe, "inputs": [path for path, _ in sources], "bytes": sizes,
            "shard_size": job.request.shard_size}  # fmt: skip


def _files(model: Model) -> set[str]:
    """All files that a model's values come from."""
    return {str(path) for tensor in model.tensors.values() for path in tensor.paths}


def _with_hashes(
    job: Job, works: Sequence[Work], digests: Mapping[Any, Sequence[Sequence[str]]]
) -> dict[str, Any]:
    """The recipe with the hashes of the models that were read."""
    recipe = copy.deepcopy(dict(job.recipe))
    read = list(zip(recipe["experts"], job.experts, strict=True))
    if job.reads_base and job.base is not None:
        read = [(recipe["base"], job.base), *read]
    merged = [work for work in works if work.program is not None]
    for i, (entry, model) in enumerate(read):
        chunks = {
            work.info.name: [
                d for part in work.parts() for d in digests[work.info.name, part[0]][i]
            ]
            for work in merged
        }
        entry[HASH] = output.content_hash({name: model.tensors[name] for name in chunks}, chunks)
    return recipe


def _result_hash(works: Sequence[Work], done: Mapping[Any, Sequence[str]]) -> str:
    chunks = {
        work.info.name: [d for part in work.parts() for d in done[work.info.name, part[0]]]
        for work in works
    }
    return output.content_hash({work.info.name: work.targets[0] for work in works}, chunks)


def _is_done(job: Job) -> bool:
    """Whether the target holds the finished result of this very recipe and these very inputs."""
    out = job.request.out
    assert out is not None
    try:
        stored = folder.read_json(out / output.RECIPE)
        there = folder.open_model(out)
    except errors.MergeError:
        return False
    kinds = {n: (t.dtype, t.shape) for files in job.files.values() for n, t in files.items()}
    if kinds != {name: (t.dtype, t.shape) for name, t in there.tensors.items()}:
        return False
    if not _alike(stored.get("recipe"), job.recipe):
        return False
    works = make_works(job, there.tensors)
    runner = Runner(job.reads_base, np.zeros((0, 2), np.uint32), 0)
    runner.outputs = runner.inputs
    memory = Memory()
    look = lambda part: (runner.digests_of(*part), runner.written(*part))
    try:
        for part, (digests, written) in in_order(look, parts_of(works), os.cpu_count() or 2):
            memory.digests[key_of(part)], memory.done[key_of(part)] = digests, written
    finally:
        runner.inputs.close()
    found = {"recipe": _with_hashes(job, works, memory.digests)}
    return {**found, "result": _result_hash(works, memory.done)} == stored


def _alike(stored: Any, recipe: Mapping[str, Any]) -> bool:
    """Whether two recipes are the same but for their hashes."""
    blank = re.compile(r'"[0-9a-f]{32}"')
    texts = [blank.sub('"?"', json.dumps(r, sort_keys=True)) for r in (stored, recipe)]
    return texts[0] == texts[1]
