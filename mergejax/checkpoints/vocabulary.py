"""Vocabularies that differ: rows of embeddings are aligned by the tokens that they stand for."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergejax.checkpoints.folder import Model, read_json
from mergejax.checkpoints.rows import Row, put_together
from mergejax.errors import MergeError, raise_all, some

LEAF = re.compile(
    r"embed_tokens|lm_head|\bwte\b|word_embeddings|shared\.weight|decoder\.(weight|bias)$"
    r"|predictions\.bias|embed_out"
)
EMBEDDING = re.compile(r"embed_tokens|\bwte\b|word_embeddings|shared\.weight")
_LISTS = ("tokenizer.json", "vocab.json", "vocab.txt")
_SENTENCES = "tokenizer.model"
_FILES = (*_LISTS, "added_tokens.json", _SENTENCES)


def leaves_of(model: Model) -> list[str]:
    """The leaves that have one row for each token, embedding and output alike."""
    named = [name for name, tensor in model.tensors.items() if LEAF.search(name) and tensor.shape]
    first = next((n for n in named if EMBEDDING.search(n)), named[0] if named else None)
    count = model.tensors[first].shape[0] if first else 0
    return [name for name in named if model.tensors[name].shape[0] == count]


def tokens_of(model: Model) -> dict[str, int]:
    """The rows of a model's tokens, as its tokenizer's files say; empty if they do not.

    Raises:
        MergeError: one of the files is damaged, or needs a package that is not installed.
    """
    found: dict[str, int] = {}
    if _SENTENCES in model.sides and not any(name in model.sides for name in _LISTS):
        found |= _pieces(model.sides[_SENTENCES])
    if "vocab.txt" in model.sides:
        lines = model.sides["vocab.txt"].read_text(encoding="utf-8").splitlines()
        found |= {token: row for row, token in enumerate(lines)}
    if "vocab.json" in model.sides:
        found |= read_json(model.sides["vocab.json"])
    if "tokenizer.json" in model.sides:
        content = read_json(model.sides["tokenizer.json"])
        listed = (content.get("model") or {}).get("vocab") or {}
        if isinstance(listed, list):  # Unigram: pairs of token and score
            listed = {pair[0]: row for row, pair in enumerate(listed)}
        found |= listed
        found |= {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    if "added_tokens.json" in model.sides:
        found |= read_json(model.sides["added_tokens.json"])
    if "tokenizer_config.json" in model.sides:
        added = read_json(model.sides["tokenizer_config.json"]).get("added_tokens_decoder") or {}
        found |= {entry["content"]: int(row) for row, entry in added.items()}
    return found


def _pieces(path: pathlib.Path) -> dict[str, int]:
    """The rows of the tokens of a SentencePiece model."""
    try:
        import sentencepiece
    except ImportError:
        raise MergeError(
            f"{path}: its tokens are read by a package that is not installed; pip install "
            "sentencepiece, or save the tokenizer.json of this model beside it"
        ) from None
    words = sentencepiece.SentencePieceProcessor()
    try:
        words.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise MergeError(f"{path} is no SentencePiece model ({error})") from error
    return {words.IdToPiece(row): row for row in range(words.GetPieceSize())}


def same_tokenizer(a: Model, b: Model) -> bool:
    """Whether two models have files of the same tokenizer, or one has none."""
    pairs = [(a.sides.get(name), b.sides.get(name)) for name in _FILES]
    if not any(x for x, _ in pairs) or not any(y for _, y in pairs):
        return True
    return all(x is y is None or (x and y and x.read_bytes() == y.read_bytes()) for x, y in pairs)


def moved(base: Model, experts: Sequence[Model]) -> list[str]:
    """A line for every expert with tokens at other rows than in the base."""
    lines = []
    for expert in experts:
        if expert is base or same_tokenizer(base, expert):
            continue
        try:
            own, others = tokens_of(base), tokens_of(expert)
        except MergeError:  # `renamed` tells
            continue
        count = sum(row != own[token] for token, row in others.items() if token in own)
        if count:
            token = next(t for t, row in others.items() if t in own and row != own[t])
            lines.append(
                f"expert '{expert.name}' has {count} tokens at other rows than '{base.name}', "
                f"such as {token!r} at {others[token]} instead of {own[token]}; align the rows "
                "with --vocabulary base or union"
            )
    return lines


def renamed(base: Model, experts: Sequence[Model]) -> list[str]:
    """A line for every expert that has other tokens at some of the base's rows."""
    lines = []
    for expert in experts:
        if expert is base or same_tokenizer(base, expert):
            continue
        try:
            own, others = ({r: t for t, r in tokens_of(m).items()} for m in (base, expert))
        except MergeError as problem:  # such as a format whose reader is not installed
            lines.append(f"the tokens of expert '{expert.name}' cannot be compared: {problem}")
            continue
        changed = [row for row, token in others.items() if own.get(row, token) != token]
        if changed:
            row = changed[0]
            lines.append(
                f"expert '{expert.name}' has {len(changed)} other tokens than '{base.name}' at the "
                f"same rows, such as {others[row]!r} instead of {own[row]!r} at {row}; their rows "
                "are merged as they stand, and the result has the base's tokenizer"
            )
    return lines


def align(models: Sequence[Model], choice: str) -> tuple[list[Model], list[str]]:
    """Models whose rows stand for the same tokens.

    A token that a model lacks has the reference's row there, so that its delta is zero. A token
    that the reference lacks (union only) has one row for all: the mean of the models that have it.
    Rows without a token stay where they are.

    Args:
        models: the first one gives tokens and rows.
        choice: 'base' keeps its rows, 'union' adds rows for the tokens of the others.

    Returns:
        The models, and what was added, dropped and kept, in sentences.

    Raises:
        MergeError: a model whose tokens are not known, though its vocabulary is another one.
    """
    reference = models[0]
    leaves = leaves_of(reference)
    counts = [row_count(model) for model in models]
    same = [
        counts[i] == counts[0] and same_tokenizer(reference, model)
        for i, model in enumerate(models)
    ]
    if not leaves or all(same):
        return list(models), []
    known = [tokens_of(reference if same[i] else model) for i, model in enumerate(models)]
    raise_all(
        [
            f"'{model.name}' has another vocabulary, and no tokenizer.json, vocab.json, "
            "vocab.txt or tokenizer.model that tells its tokens; add its tokenizer"
            for model, tokens in zip(models, known, strict=True)
            if not tokens
        ]
    )
    known = [
        {token: row for token, row in tokens.items() if row < count}
        for tokens, count in zip(known, counts, strict=True)
    ]
    wanted = dict(known[0])
    if choice == "union":
        behind = max(tokens_of(reference).values()) + 1
        added = [t for own in known[1:] for t in sorted(own, key=own.__getitem__)]
        for token in dict.fromkeys(token for token in added if token not in wanted):
            wanted[token], behind = behind, behind + 1
    total = max(counts[0], *(row + 1 for row in wanted.values()))
    names: list[str | None] = [None] * total
    for token, row in wanted.items():
        names[row] = token
    views = []
    for i in range(len(models)):
        places = [_place(i, row, token, known, counts) for row, token in enumerate(names)]
        views.append(_aligned(i, places, models, leaves))
    notes = _notes(models, known, wanted, counts, total)
    new = {token: row for token, row in wanted.items() if token not in known[0]}
    texts = {**reference.texts, **_tokenizer_files(reference, new)}
    config = _resized(reference.config, total) if total != counts[0] else reference.config
    views[0] = dataclasses.replace(views[0], config=config, texts=texts)
    return views, notes


def row_count(model: Model) -> int:
    """How many tokens a model has room for; 0 if it has none."""
    leaves = leaves_of(model)
    return model.tensors[leaves[0]].shape[0] if leaves else 0


def _place(
    i: int,
    row: int,
    token: str | None,
    known: Sequence[Mapping[str, int]],
    counts: Sequence[int],
) -> tuple[Row, ...]:
    """The rows of the models that one row of the aligned model i is the mean of."""
    if token is None:  # padding: its place is all that it has
        return ((i if row < counts[i] else 0, row),)
    if token in known[0]:
        return ((i, known[i][token]),) if token in known[i] else ((0, row),)
    return tuple((j, own[token]) for j, own in enumerate(known) if token in own)


def _aligned(
    i: int, places: Sequence[tuple[Row, ...]], models: Sequence[Model], leaves: Sequence[str]
) -> Model:
    """Model i with its rows at their new places."""
    if list(places) == [((i, row),) for row in range(row_count(models[i]))]:
        return models[i]
    used = {j for rows in places for j, _ in rows}
    tensors = dict(models[i].tensors)
    for name in leaves:
        if all(name in models[j].tensors for j in used) and name in tensors:
            tensors[name] = put_together(places, [m.tensors.get(name) for m in models])
    return dataclasses.replace(models[i], tensors=tensors)


def _notes(
    models: Sequence[Model],
    known: Sequence[Mapping[str, int]],
    wanted: Mapping[str, int],
    counts: Sequence[int],
    total: int,
) -> list[str]:
    reference = models[0]
    padding = counts[0] - len(set(known[0].values()))
    kept = f", {padding} of them without a token, which stay in place" if padding else ""
    lines = [f"the vocabulary has {total} rows; '{reference.name}' has {counts[0]}{kept}"]
    for model, own in zip(models[1:], known[1:], strict=True):
        if own == known[0]:
            continue
        more = [token for token in own if token not in known[0]]
        added = [token for token in more if token in wanted]
        dropped = [token for token in more if token not in wanted]
        lacking = [token for token in known[0] if token not in own]
        said = [
            f"{what} {len(tokens)} tokens ({some([ascii(t)[1:-1] for t in tokens])})"
            for what, tokens in (
                ("adds", added),
                ("loses", dropped),
                ("takes the reference's rows for", lacking),
            )
            if tokens
        ]
        shared = sum(token in own for token in known[0])
        lines.append(f"'{model.name}' shares {shared} tokens, {', '.join(said) or 'all there are'}")
    return lines


def _resized(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A configuration with another number of tokens, wherever it says one."""
    return {
        key: rows
        if key == "vocab_size"
        else _resized(value, rows)
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def _tokenizer_files(reference: Model, new: Mapping[str, int]) -> dict[str, str]:
    """The files of the reference's tokenizer that change when tokens are added, with their text."""
    if not new:
        return {}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    texts = {}
    if "tokenizer.json" in reference.sides:
        content = read_json(reference.sides["tokenizer.json"])
        added = [{"id": i, "content": t, **plain, "special": False} for t, i in new.items()]
        content["added_tokens"] = [*(content.get("added_tokens") or []), *added]
        texts["tokenizer.json"] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if "tokenizer_config.json" in reference.sides:
        content = read_json(reference.sides["tokenizer_config.json"])
        if "added_tokens_decoder" in content:
            more = {str(i): {"content": t, **plain, "special": False} for t, i in new.items()}
            content["added_tokens_decoder"] |= more
            text = json.dumps(content, indent=2, ensure_ascii=False)
            texts["tokenizer_config.json"] = text + "\n"
    if "added_tokens.json" in reference.sides or not texts:
        held = reference.sides.get("added_tokens.json")
        content = {**(read_json(held) if held else {}), **new}
        texts["added_tokens.json"] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return texts
