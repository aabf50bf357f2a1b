"""What headers, and a few values, tell about models that are to be merged."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mergejax.checkpoints import vocabulary
from mergejax.checkpoints.files import Files
from mergejax.checkpoints.folder import Model
from mergejax.checkpoints.safetensors import Tensor

_QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|SCB|weight_scale(_inv)?|absmax|quant_state.*)$")
_SAMPLE = 4096  # bytes of each tensor that are compared first


class Finding(NamedTuple):
    """One thing that is wrong, or odd, with one tensor of one model.

    Attributes:
        owner: whose it is, 'expert 'b''.
        cause: what is the matter, as the start of a sentence.
        tensor: its name, or '' if it is about the whole model.
        detail: what belongs to this tensor alone.
        advice: what to do.
    """

    owner: str
    cause: str
    tensor: str
    detail: str
    advice: str

    def __str__(self) -> str:
        name = f" '{self.tensor}'" if self.tensor else ""
        return f"{self.owner} {self.cause}{name}{self.detail}; {self.advice}"


def sentences(findings: Iterable[Finding]) -> list[str]:
    """One sentence for each; more than three of one cause become one, with a count.

    Example:
        >>> few = [Finding("expert 'b'", "lacks", name, "", "merge it") for name in "wxyz"]
        >>> sentences(few)
        ["expert 'b' lacks 4 tensors: 'w', 'x', 'y' and 1 more; merge it"]
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.owner, finding.cause, finding.advice), []).append(finding)
    lines = []
    for (owner, cause, advice), group in groups.items():
        if len(group) <= 3:
            lines += [str(finding) for finding in group]
            continue
        first = ", ".join(f"'{finding.tensor}'{finding.detail}" for finding in group[:3])
        more = f"{first} and {len(group) - 3} more"
        lines.append(f"{owner} {cause} {len(group)} tensors: {more}; {advice}")
    return lines


def is_float(dtype: np.dtype) -> bool:
    """Whether a stored type is a floating-point one."""
    return dtype.kind == "f" or (dtype.kind == "V" and dtype != ml_dtypes.float8_e8m0fnu)


def owner_of(model: Model, base: Model | None) -> str:
    """What messages call a model."""
    return "the base" if model is base else f"expert '{model.name}'"


def differences(base: Model | None, experts: Sequence[Model]) -> list[Finding]:
    """Names, shapes and types that do not fit the base's, or the first expert's without a base."""
    reference = experts[0] if base is None else base
    other = "the base" if base is not None else f"expert '{reference.name}'"
    found = []
    for expert in experts:
        if expert is not reference:
            found += _against(reference, other, expert)
    for model in (*([] if base is None else [base]), *experts):
        found += _quantised(owner_of(model, base), model)
    return found


def _against(reference: Model, other: str, expert: Model) -> list[Finding]:
    owner, found = f"expert '{expert.name}'", []
    for name, wanted in reference.tensors.items():
        got = expert.tensors.get(name)
        if got is None:
            advice = f"{other} has it; merge models of one architecture"
            found.append(Finding(owner, "lacks", name, "", advice))
        elif got.shape != wanted.shape:
            found.append(_shape_finding(owner, other, name, wanted, got))
        elif is_float(got.dtype) != is_float(wanted.dtype) or (
            not is_float(got.dtype) and got.dtype != wanted.dtype
        ):
            detail = f" of type {got.dtype} instead of {wanted.dtype}"
            found.append(Finding(owner, "has", name, detail, "cast it first"))
    found += [
        Finding(owner, "has", name, f", which {other} lacks", "leave it out or complete the base")
        for name in expert.tensors
        if name not in reference.tensors
    ]
    return found


def _shape_finding(owner: str, other: str, name: str, wanted: Tensor, got: Tensor) -> Finding:
    rows = wanted.shape[1:] == got.shape[1:] and wanted.shape and got.shape
    if rows and vocabulary.LEAF.search(name):
        detail = f" of {got.shape[0]} rows instead of {wanted.shape[0]}"
        advice = "align rows by token with --vocabulary base or union"
        return Finding(owner, "has another vocabulary:", name, detail, advice)
    if wanted.shape == got.shape[::-1]:
        return Finding(
            owner, "stores", name, f" transposed ({list(got.shape)})", "transpose it as in " + other
        )
    detail = f" of shape {list(got.shape)} instead of {list(wanted.shape)}"
    return Finding(owner, "has", name, detail, "merge models of one size")


def _quantised(owner: str, model: Model) -> list[Finding]:
    advice = "merge the weights before their quantisation"
    found = [
        Finding(owner, "is quantised:", name, "", advice)
        for name in model.tensors
        if _QUANTISED.search(name)
    ]
    if model.config.get("quantization_config") and not found:
        found.append(Finding(owner, "is quantised by its config.json", "", "", advice))
    return found


def style(names: Sequence[str]) -> str:
    """How kernels are oriented: Flax names them 'kernel' and stores [in, out], PyTorch does not.

    Example:
        >>> style(["block_0/dense/kernel"]), style(["model.layers.0.q_proj.weight"])
        ('flax', 'torch')
    """
    return "flax" if any(re.search(r"(^|/)kernel$", name) for name in names) else "torch"


def type_warnings(base: Model | None, experts: Sequence[Model]) -> list[str]:
    """A line for every expert that stores floats in another type than the reference."""
    reference = experts[0] if base is None else base
    lines = []
    for expert in experts:
        pairs = {
            (got.dtype.name, wanted.dtype.name)
            for name, wanted in reference.tensors.items()
            if (got := expert.tensors.get(name)) and got.dtype != wanted.dtype
        }
        if pairs:
            stored = ", ".join(f"{got} for {wanted}" for got, wanted in sorted(pairs))
            lines.append(f"expert '{expert.name}' stores {stored}; sums are taken in float32")
    return lines


def doubles(base: Model | None, experts: Sequence[Model]) -> tuple[list[str], list[str]]:
    """Experts that are one and the same (problems), and experts equal to the base (warnings)."""
    problems, warnings = [], []
    with Files() as files:
        for a, b in itertools.combinations(experts, 2):
            if a.path.resolve() == b.path.resolve():
                problems.append(f"{a.path} is given as an expert twice; name each once")
            elif _equal(a, b, files):
                problems.append(
                    f"experts '{a.name}' and '{b.name}' hold the same values; leave one out"
                )
        for expert in experts if base is not None else ():
            same = expert.path.resolve() == base.path.resolve()  # type: ignore[union-attr]
            if same or _equal(base, expert, files):  # type: ignore[arg-type]
                warnings.append(f"expert '{expert.name}' holds the base's values; it adds nothing")
    return problems, warnings


def _equal(a: Model, b: Model, files: Files) -> bool:
    """Whether two models hold the same values: a sample tells nearly always, else all is read."""
    return a.tensors.keys() == b.tensors.keys() and _all_same(
        [(tensor, b.tensors[name]) for name, tensor in a.tensors.items()], files
    )


def same_values(a: Tensor, b: Tensor, files: Files) -> bool:
    """Whether two tensors hold the same values."""
    return _all_same([(a, b)], files)


def _all_same(pairs: Sequence[tuple[Tensor, Tensor]], files: Files) -> bool:
    if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
        return False
    for length in (_SAMPLE, None):
        for a, b in pairs:
            count = a.bytes if length is None else min(length, a.bytes)
            if not _same_product(a, b) or not _same_bytes(a, b, count, files):
                return False
    return True


def _same_product(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same part of an adapter, or none."""
    if a.product is None or b.product is None:
        return a.product is b.product
    if not all(np.array_equal(x, y) for x, y in zip(a.product[1:3], b.product[1:3], strict=True)):
        return False
    first, second = a.product.factors, b.product.factors
    if first is None or second is None:
        return first is second
    return np.array_equal(first(), second())


def _same_bytes(a: Tensor, b: Tensor, count: int, files: Files) -> bool:
    """Whether the middle `count` bytes of two tensors are the same."""
    first = (a.bytes - count) // 2
    for start in range(first, first + count, 2**22):
        size = min(2**22, first + count - start)
        pair = []
        for tensor in (a, b):
            content = bytearray(size)
            files.read_into(tensor.path, tensor.offset + start, memoryview(content))
            pair.append(content)
        if pair[0] != pair[1]:
            return False
    return True


def transposed(base: Model, experts: Sequence[Model]) -> list[Finding]:
    """Square matrices of experts that are nearer to the base's transpose than to the base."""
    squares = [
        name
        for name, tensor in base.tensors.items()
        if len(tensor.shape) == 2 and tensor.shape[0] == tensor.shape[1] > 1
        if is_float(tensor.dtype) and tensor.rows is None
    ]
    cause = "is nearer to the base's transpose than to the base in"
    advice = "transpose it, if the model was stored in another layout"
    with Files() as files:
        return [
            Finding(f"expert '{expert.name}'", cause, name, "", advice)
            for expert in experts
            for name in squares
            if expert.tensors[name].rows is None
            and _looks_transposed(base.tensors[name], expert.tensors[name], files)
        ]


def _looks_transposed(base: Tensor, other: Tensor, files: Files) -> bool:
    size = base.shape[0]
    rows, columns = (np.linspace(0, size - 1, min(n, size)).astype(int) for n in (3, 9))
    there = _rows(other, rows, files)[:, columns]
    straight = np.abs(there - _rows(base, rows, files)[:, columns]).sum()
    turned = np.abs(there - _rows(base, columns, files)[:, rows].T).sum()
    return bool(turned < 0.7 * straight)  # of unrelated matrices either may be a little nearer


def _rows(matrix: Tensor, rows: np.ndarray, files: Files) -> np.ndarray:
    """Some rows of a matrix as float64."""
    width = matrix.shape[1] * matrix.dtype.itemsize
    content = memoryview(bytearray(len(rows) * width))
    for i, row in enumerate(rows):
        place = content[i * width : (i + 1) * width]
        files.read_into(matrix.path, matrix.offset + int(row) * width, place)
    return np.frombuffer(content, matrix.dtype).reshape(len(rows), -1).astype(np.float64)


def differing_buffers(
    base: Model | None, experts: Sequence[Model], names: Sequence[str]
) -> list[Finding]:
    """Tensors of the given names whose values are not the same in all models."""
    reference = experts[0] if base is None else base
    found = []
    with Files() as files:
        for expert in experts:
            for name in names:
                a, b = reference.tensors[name], expert.tensors[name]
                if not _same_bytes(a, b, a.bytes, files):
                    advice = f"exclude it with --exclude '{re.escape(name)}' to keep the base's"
                    cause = "has other integers, which cannot be merged, in"
                    found.append(Finding(f"expert '{expert.name}'", cause, name, "", advice))
    return found


def as_json(findings: Iterable[Finding]) -> list[Mapping[str, str]]:
    """Every finding by itself, for programs."""
    return [{"model": f.owner, "tensor": f.tensor, "problem": str(f)} for f in findings]
