"""From a request to everything that a merge needs, or to all the reasons why it cannot be done."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergejax import errors
from mergejax.checkpoints import adapters, compare, folder, hub, output, target, tied, vocabulary
from mergejax.checkpoints.compare import Finding
from mergejax.checkpoints.files import HASH
from mergejax.checkpoints.folder import Model
from mergejax.checkpoints.request import FLOATS, Request
from mergejax.checkpoints.safetensors import Tensor
from mergejax.checkpoints.views import seen_through_plans
from mergejax.version import __version__

_CONV1D = {"gpt2", "openai-gpt"}  # kernels are stored [in, out] there


@dataclasses.dataclass(frozen=True)
class Job:
    """A merge that can be done.

    Attributes:
        request: what was asked for.
        base: the base, or None.
        experts: the experts.
        parents: the models that were opened; base and experts may be put together from them.
        method: the chain.
        plan: which stages each leaf goes through.
        merged: the leaves that the method merges.
        copied: the leaves that keep the reference's values.
        reads_base: whether the method looks at the base's values.
        files: the tensors of every file of the result.
        recipe: what the result says about itself; hashes are not known yet.
        stats: of the experts, by leaf name and kind, mapped from the disk.
        warnings: what looks odd.
        notes: what was done about vocabularies and layers.
    """

    request: Request
    base: Model | None
    experts: tuple[Model, ...]
    parents: tuple[Model, ...]
    method: Any
    plan: Any
    merged: tuple[Any, ...]
    copied: tuple[Any, ...]
    reads_base: bool
    files: Mapping[str, Mapping[str, Tensor]]
    recipe: Mapping[str, Any]
    stats: Mapping[str, Mapping[str, Sequence[Any]]]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def reference(self) -> Model:
        """The model whose names, settings and types the result takes."""
        return self.experts[0] if self.base is None else self.base


@dataclasses.dataclass
class Problems:
    """What is wrong with a request: sentences, and findings about single tensors."""

    lines: list[str] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def attempt(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls a function; keeps its sentences and returns None if it refuses."""
        try:
            return function(*args, **options)
        except errors.MergeError as error:
            self.lines += str(error).splitlines()
            return None

    def sentences(self) -> list[str]:
        return list(dict.fromkeys([*self.lines, *compare.sentences(self.findings)]))


def prepare(request: Request) -> tuple[Job | None, Problems, list[str]]:
    """Looks at a request from all sides; reads headers and a few values only.

    Returns:
        The job, or None if there are problems; the problems; the warnings.
    """
    problems = Problems()
    models = open_models(request, problems)
    warnings = [line for model in models if model is not None for line in model.warnings]
    views = None
    if all(model is not None for model in models):
        views = problems.attempt(seen_through_plans, request, models)
    if views is not None:
        base, experts, notes = views
        if request.vocabulary == "error":
            warnings += vocabulary.renamed(models[0], models[1:])
        problems.findings += compare.differences(base, experts)
        if not problems.findings:
            warnings += _look_at_values(request, models, base, experts, problems)
        else:
            problems.lines += _same_paths(models[request.base is not None :])
    problems.lines += target.path_problems(request)
    method = job = None
    if not _missing(request, models):
        from mergejax.checkpoints.chosen import method_of  # here, for it imports JAX

        method = problems.attempt(method_of, request.method, request.weights)
    if views is not None and method is not None and not problems.findings:
        job = problems.attempt(_plan, request, base, tuple(experts), method)
    if job is not None:
        job = dataclasses.replace(
            job, parents=tuple(models), warnings=tuple(warnings), notes=tuple(notes)
        )
    if job is not None:
        problems.lines += target.space_problems(request.out, predicted_disk(job))
    if request.strict:
        problems.lines += [f"{line} (--strict)" for line in warnings]
    return (None if problems.sentences() else job), problems, warnings


def open_models(request: Request, problems: Problems) -> list[Any]:
    """The base, if there is one, and the experts; None for one that cannot be opened."""
    paths = [*([] if request.base is None else [request.base]), *request.experts]
    names = folder.distinct_names(list(request.experts))
    if request.base is not None:
        own = request.base.resolve().name
        names = [own if own not in names else f"{own} (base)", *names]
    models: list[Any] = []
    for given, name in zip(paths, names, strict=True):
        path = problems.attempt(hub.find, given)
        if path is None:
            models.append(None)
        elif not adapters.is_adapter(path):
            first = models[0] if models else None
            models.append(problems.attempt(_opened, path, name, first))
        elif request.base is not None and models[:1] == [None]:
            models.append(None)  # its base cannot be opened, which has been said
        else:
            base = models[0] if models and request.base is not None else None
            models.append(problems.attempt(adapters.open_adapter, path, name, base))
    return models


def _opened(path: pathlib.Path, name: str, reference: Model | None) -> Model:
    return tied.as_one(folder.open_model(path, name), reference)


def _missing(request: Request, models: Sequence[Any]) -> bool:
    """Whether a path leads nowhere, which is answered at once."""
    paths = [*([] if request.base is None else [request.base]), *request.experts]
    return any(m is None and not p.exists() for m, p in zip(models, paths, strict=True))


def _same_paths(experts: Sequence[Model]) -> list[str]:
    paths = [expert.path.resolve() for expert in experts]
    twice = {str(e.path) for e, path in zip(experts, paths, strict=True) if paths.count(path) > 1}
    return [f"{path} is given as an expert twice; name each once" for path in sorted(twice)]


def _look_at_values(
    request: Request, parents: Any, base: Any, experts: Sequence[Model], problems: Problems
) -> list[str]:
    """What a look at a few values tells: doubles, integers that differ, transposed matrices."""
    from mergejax.leaves import is_counter

    reference = experts[0] if base is None else base
    own = None if request.base is None else parents[0]
    lines, warnings = compare.doubles(own, parents[own is not None :])
    problems.lines += lines
    integers = [
        name
        for name, tensor in reference.tensors.items()
        if not compare.is_float(tensor.dtype) and not is_counter(name)
    ]
    problems.findings += compare.differing_buffers(base, experts, integers)
    if base is not None:
        warnings += compare.sentences(compare.transposed(base, experts))
    return [*compare.type_warnings(base, experts), *warnings]


def predicted_disk(job: Job) -> int:
    """The bytes of the result."""
    texts = [
        output.recipe_text(job.recipe, output.UNKNOWN),
        output.card(job.parents, job.recipe),
        *([output.index_text(job.files)] if len(job.files) > 1 else []),
    ]
    changed = output.side_texts(job.reference, job.recipe["dtype"])
    texts += changed.values()
    sides = [p.stat().st_size for n, p in job.reference.sides.items() if n not in changed]
    return (
        output.file_bytes(job.files, job.recipe) + sum(sides) + sum(len(t.encode()) for t in texts)
    )


def _plan(
    request: Request,
    base: Model | None,
    experts: tuple[Model, ...],
    method: Any,
) -> Job:
    from mergejax.chains import chain, reduces
    from mergejax.checkpoints import statistics
    from mergejax.checkpoints.chosen import needs_base
    from mergejax.leaves import BUFFER, HEAD
    from mergejax.methods.combine import mean
    from mergejax.plan import make_plan

    if not reduces(method):
        raise errors.MergeError(
            f"{method!r} makes one model of each expert, not one of all; end it with a reduction "
            "such as |mean()"
        )
    reference = experts[0] if base is None else base
    infos = _describe(request, reference)
    merged = tuple(info for info in infos if info.role not in (BUFFER, HEAD))
    copied = tuple(info for info in infos if info.role in (BUFFER, HEAD))
    if not merged:
        raise errors.MergeError("no tensor is left to merge; relax --only or --exclude")
    given = statistics.read(request.stats, experts, method)
    merged, stats = statistics.of_leaves(given, merged, len(experts))
    plan = make_plan(method, chain(mean()), merged, len(experts), base is not None, [*given.kinds])
    reads_base = base is not None and needs_base(plan, len(experts))
    out_type = None if request.dtype is None else FLOATS[request.dtype]
    types = {
        name: (out_type if out_type and compare.is_float(t.dtype) else t.dtype, t.shape)
        for name, t in reference.tensors.items()
    }
    types |= {twin: types[name] for twin, name in reference.twins.items()}
    several = request.format == "safetensors"
    files = output.shards(types, request.shard_size if several else 2**63)
    recipe = make_recipe(request, base, experts, method, reads_base)
    recipe |= {"stats": given.contents} if given.contents else {}
    output.place(files, reference.path, recipe)  # refuses what the format does not have
    return Job(
        request, base, experts, (), method, plan, merged, copied, reads_base, files, recipe,
        stats, (), (),
    )  # fmt: skip


def _describe(request: Request, reference: Model) -> list[Any]:
    from mergejax.leaves import HEAD, describe, unmatched

    names = list(reference.tensors)
    errors.raise_all(unmatched(request.only, names))
    specs = {name: (t.shape, t.dtype) for name, t in reference.tensors.items()}
    conv1d = reference.config.get("model_type") in _CONV1D
    pattern = r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$"
    known = conv1d and any(re.search(pattern, name) for name in names)
    layouts = {pattern: "io"} if known else None
    # The name of an NNX variable ends with what holds its value, which tells nothing of its role.
    bare = {name.removesuffix("/value"): name for name in names}
    seen = {short: specs[name] for short, name in bare.items()}
    infos = describe(
        seen, style=compare.style(list(bare)), exclude=request.exclude, layouts=layouts
    )
    infos = [dataclasses.replace(info, name=bare[info.name]) for info in infos]
    if not request.only:
        return infos
    return [
        info
        if any(re.search(pattern, info.name) for pattern in request.only)
        else dataclasses.replace(info, role=HEAD)
        for info in infos
    ]


def make_recipe(
    request: Request,
    base: Model | None,
    experts: Sequence[Model],
    method: Any,
    reads_base: bool,
) -> dict[str, Any]:
    """What the result says about itself: everything that determines its bytes."""
    import jax

    text = request.method if isinstance(request.method, str) else repr(method)
    used = output.UNKNOWN if reads_base else None
    return {
        "mergejax": __version__,
        "jax": jax.__version__,
        "method": text,
        "weights": None if request.weights is None else list(request.weights),
        "base": None if base is None else {"name": base.name, HASH: used},
        "experts": [{"name": expert.name, HASH: output.UNKNOWN} for expert in experts],
        "seed": request.seed,
        "dtype": request.dtype,
        "format": request.format,
        "only": list(request.only),
        "exclude": list(request.exclude),
        "vocabulary": request.vocabulary,
        "layers": [[source.label for source in sources] for sources in request.layers],
    }
