"""One model from one file format to another, every value as it was."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from mergejax.checkpoints.files import Files, hasher, pieces_of
from mergejax.checkpoints.folder import CONFIG, Model, open_model
from mergejax.checkpoints.formats import FILES, lay_out
from mergejax.checkpoints.safetensors import QUANTIZED, read_header
from mergejax.errors import MergeError, did_you_mean, raise_all

SUFFIXES = {".safetensors": "safetensors", ".npz": "npz", ".msgpack": "msgpack", "": "orbax"}


LAYOUTS = ("flax", "torch")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    form: str | None = None,
    *,
    layout: str | None = None,
    config: str | os.PathLike | None = None,
    ignore: str | Sequence[str] = (),
    padding: str = "error",
    memory: int = 2**28,
    say: Callable[[str], None] = lambda _: None,
) -> pathlib.Path:
    """Writes a model in another format, and if asked in Flax's or PyTorch's names and layouts.

    Leaves of trees have names such as 'block_0/dense/kernel' in flat formats; in trees, names are
    taken apart at each '/'. Values are copied in pieces of 4 MB, from Orbax in chunks as they are
    stored there, so memory does not grow with the model.

    Args:
        source: whatever a merge reads, but no adapter; or a quantised model
            (`mj.quantize.save`), which becomes an ordinary one.
        target: the file, or the folder for Orbax, to write; nothing may stand there.
        form: 'safetensors', 'npz', 'msgpack' or 'orbax'; by default what the target's name ends
            with, and for a name without ending Orbax, or a folder of the Hub if `layout` is
            'torch'.
        layout: 'flax' or 'torch': names and layouts of the Flax model (`mj.models`), or of PyTorch;
            by default they stay.
        config: of a config.json, if the source has none beside it.
        ignore: regular expressions of tensors to leave out on the way to Flax.
        padding: of the vocabulary beyond `vocab_size`: 'error', 'keep' or 'drop'.
        memory: bytes of a transposed leaf that are held at most; what is larger is read several
            times.
        say: is told what was left out or kept, sentence by sentence.

    Returns:
        The path that was written.

    Raises:
        MergeError: a source that cannot be read, a target that exists, an unknown format, types
            that the format does not have.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> np.savez(folder / 'a.npz', **{'dense/kernel': np.ones((2, 3), np.float32)})
        >>> written = convert(folder / 'a.npz', folder / 'a.safetensors')
        >>> {name: tensor.shape for name, tensor in open_model(written).tensors.items()}
        {'dense/kernel': (2, 3)}
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    chosen = form or SUFFIXES.get(target.suffix, "")
    hub = layout == "torch" and not target.suffix and form in (None, "safetensors")
    chosen = "safetensors" if hub else chosen
    problems = []
    if layout not in (None, *LAYOUTS):
        problems.append(f"layout '{layout}' is unknown, {did_you_mean(str(layout), LAYOUTS)}")
    if chosen not in FILES:
        problems.append(
            f"{target}: its format is unknown, {did_you_mean(form or target.suffix, FILES)}"
        )
    if target.exists():
        problems.append(f"{target} exists; choose another target, or remove it")
    raise_all(problems)
    staged = target.with_name(f".{target.name}.new")
    whole = target.with_name(f".{target.name}.whole.safetensors")
    try:
        model = open_model(_dequantized(source, whole))
        if layout is not None:
            model, notes = _laid_out(model, layout, config, ignore, padding, memory)
            for note in notes:
                say(note)
        tensors = model.tensors
        files = lay_out(chosen, {name: (t.dtype, t.shape) for name, t in tensors.items()}, staged)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        with Files() as reader, Files(os.O_RDWR | os.O_CREAT) as writer:
            digests = {}
            for name, tensor in tensors.items():
                place, done, written = files.placed[name], 0, hasher()
                for piece in pieces_of(tensor.path, tensor.offset, tensor.bytes, reader):
                    writer.write_from(place.path, place.offset + done, piece)
                    written.update(piece)
                    done += len(piece)
                digests[name] = written.digest()
            files.write(writer)
            for name, place in files.placed.items():
                found = hasher()
                for piece in pieces_of(place.path, place.offset, place.bytes, writer):
                    found.update(piece)
                if found.digest() != digests[name]:
                    raise OSError(f"{target} does not hold what was written for '{name}'")
            writer.sync()
        whole_folder = hub or not FILES[chosen]
        if whole_folder:
            _copy_sides(model, staged)
        (staged if whole_folder else staged / FILES[chosen]).rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        whole.unlink(missing_ok=True)
    return target


def _laid_out(
    model: Model,
    layout: str,
    config: str | os.PathLike | None,
    ignore: str | Sequence[str],
    padding: str,
    memory: int,
) -> tuple[Model, list[str]]:
    """The model as the other framework names it, and what was left out."""
    from mergejax.models import folders

    chosen = folders.config_for(model, config)
    if folders.is_flax(model) == (layout == "flax"):
        raise MergeError(f"{model.path} has {layout}'s names already; leave --layout out")
    if layout == "flax":
        view, _, notes = folders.in_flax(
            model, chosen, ignore=ignore, padding=padding, budget=memory
        )
    else:
        view, _, notes = folders.in_torch(model, chosen, budget=memory)
    text = json.dumps(dict(chosen), indent=2, sort_keys=True) + "\n"
    return dataclasses.replace(view, texts={**view.texts, CONFIG: text}), notes


def _copy_sides(model: Model, folder: pathlib.Path) -> None:
    """The configuration and the tokenizer, into a folder."""
    for name, file in model.sides.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    for name, text in model.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _dequantized(source: pathlib.Path, whole: pathlib.Path) -> pathlib.Path:
    """The source, or where it is quantised a file of the ordinary model that it stands for."""
    named = source.suffix == ".safetensors" and source.is_file()
    if not named or read_header(source)[1].get("format") != QUANTIZED:
        return source
    from safetensors.numpy import save_file

    from mergejax.quantize import dequantize, load

    whole.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(x) for name, x in dequantize(load(source)).items()}, whole)
    return whole
