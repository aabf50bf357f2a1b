"""Text classification sets as tasks, cut into tokens as a pre-trained encoder knows them."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mergejax import errors
from mergejax.data.sources import Kind, Source
from mergejax.models import sentence

_ONE = ("text",)
_PAIR = ("sentence1", "sentence2")
# The labels of GLUE's test parts are withheld, so the validation parts are what is reported.
SOURCES: Mapping[str, Source] = {
    "sst2": Source("glue/sst2", test="validation", features=("sentence",)),
    "cola": Source("glue/cola", test="validation", features=("sentence",)),
    "mrpc": Source("glue/mrpc", test="validation", features=_PAIR),
    "rte": Source("glue/rte", test="validation", features=_PAIR),
    "trec": Source("trec", label="label-coarse", features=_ONE),
    "ag_news": Source(
        "ag_news_subset",
        *("test[:60%]", "test[60%:70%]", "test[70%:]"),  # so that the test part alone is enough
        features=("title", "description"),
    ),
    "clinc": Source("clinc_oos", "train", "validation", "test", label="intent", features=_ONE),
    "banking77": Source(
        "banking77", features=_ONE, origin="github.com/PolyAI-LDN/task-specific-datasets"
    ),
    "subj": Source("subj", features=_ONE, origin="github.com/harvardnlp/sent-conv-torch"),
}
Cut = Callable[[Sequence[str]], np.ndarray]


def cutter(weights: str, length: int) -> Cut:
    """What makes tokens of one text or a pair, as the encoder's tokenizer does.

    Args:
        weights: of the encoder, as for `sentence.folder`; its folder holds tokenizer.json.
        length: in tokens; longer texts are cut there, shorter ones are followed by -1.

    Returns:
        One or two texts -> int32 [length].

    Raises:
        MergeError: there is no such encoder or tokenizer; a package that is not installed.
    """
    try:
        from tokenizers import Tokenizer  # here, because only texts need it
    except ImportError as error:
        raise errors.MergeError(
            f"the text tasks need a package that is not installed ({error}): "
            "run pip install 'mergejax[texts]'"
        ) from error
    folder = sentence.folder(weights)
    tokenizer = Tokenizer.from_file(str(_file(folder)))
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()

    def cut(texts: Sequence[str]) -> np.ndarray:
        tokens = np.full([length], -1, np.int32)
        ids = tokenizer.encode(*texts).ids  # type: ignore[arg-type]
        tokens[: len(ids)] = ids
        return tokens

    return cut


def _file(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise errors.MergeError(f"{folder}: there is no tokenizer.json, which the texts are cut by")
    return path


def kind(weights: str, length: int) -> Kind:
    """Texts as int32 [length], from the sets in `SOURCES`; see `cutter` for the arguments."""

    def decode(record: Mapping[str, Any], source: Source, cut: Cut) -> np.ndarray:
        return cut([record[feature].decode() for feature in source.features])

    return Kind(
        name="text",
        extra="texts",
        sources=SOURCES,
        decoder=lambda source: functools.partial(
            decode, source=source, cut=cutter(weights, length)
        ),
        recipe=[weights, length],
    )
