"""Models by their names on the Hugging Face Hub: from its cache, or fetched."""

import pathlib
import re
from typing import Any

from mergejax.errors import MergeError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SIDES = ["*.json", "*.txt", "*.model", "*.jinja", "*.md"]
_KINDS = ("*.safetensors", "*.bin")  # the second is fetched where the first is not there


def find(path: pathlib.Path) -> pathlib.Path:
    """The folder of a model; for 'owner/name' that is no path here, the Hub's copy.

    What the cache of `huggingface_hub` holds is taken as it is; otherwise the model is fetched into
    it. Without that library, and for any other path, the path itself.

    Raises:
        MergeError: neither a path nor a model that the Hub gives.

    Example:
        >>> find(pathlib.Path("/some/folder")).as_posix()
        '/some/folder'
    """
    name = path.as_posix()
    if path.exists() or not _NAME.fullmatch(name) or path.parent.exists():
        return path
    try:
        import huggingface_hub
    except ImportError:
        return path
    get = huggingface_hub.snapshot_download
    return _cached(get, name) or _fetched(get, name)


def _cached(get: Any, name: str) -> pathlib.Path | None:
    try:
        folder = pathlib.Path(get(name, local_files_only=True))
    except Exception:  # not there, in whatever words
        return None
    return folder if _has_weights(folder) else None


def _fetched(get: Any, name: str) -> pathlib.Path:
    try:
        for kind in _KINDS:
            folder = pathlib.Path(get(name, allow_patterns=[*_SIDES, kind], etag_timeout=5))
            if _has_weights(folder):
                break
    except Exception as error:  # the library lets through what its transport raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise MergeError(
            f"{name}: there is no such file or folder, and the Hub gives no model of that name "
            f"({type(error).__name__}: {reason}); check the path"
        ) from None
    return folder


def _has_weights(folder: pathlib.Path) -> bool:
    return any(any(folder.glob(kind)) for kind in _KINDS)
