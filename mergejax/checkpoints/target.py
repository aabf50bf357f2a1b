"""What is wrong with the place where a result is to stand."""

import os
import pathlib
import shutil

from mergejax.checkpoints.request import Request, show_size


def path_problems(request: Request) -> list[str]:
    """What is wrong with the place of the output; what stands there is looked at later."""
    if request.out is None:
        return []
    out, problems = request.out, []
    whole = out.resolve()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        problems.append(f"{out} is not a folder; choose another output")
    elif not existing_parent(out).is_dir():
        problems.append(f"{existing_parent(out)} is not a folder; choose another output than {out}")
    for path in (*request.experts, *([] if request.base is None else [request.base])):
        source = path.resolve()
        if path.is_dir() and whole.is_relative_to(source):
            problems.append(f"{out} is or lies inside the input {path}; choose another output")
        elif source.is_relative_to(whole):
            problems.append(f"the input {path} lies inside the output {out}; choose another output")
    return problems


def space_problems(out: pathlib.Path | None, needed: int) -> list[str]:
    """Why so many bytes cannot be written to a place."""
    if out is None:
        return []
    parent = existing_parent(out)
    free = shutil.disk_usage(parent).free
    if needed > free:
        return [
            f"{out} needs {show_size(needed)}, but {parent} has {show_size(free)} free; make "
            "space, or choose another disk"
        ]
    return []


def is_free(out: pathlib.Path) -> bool:
    """Whether nothing stands at a place, or an empty folder."""
    return not out.exists() or not any(out.iterdir())


def problems(out: pathlib.Path, overwrite: bool) -> list[str]:
    """Why nothing can be written to a place: read-only, or occupied."""
    parent = existing_parent(out)
    if not os.access(parent, os.W_OK):
        return [f"{parent} is read-only; choose another output"]
    if is_free(out) or overwrite:
        return []
    return [f"{out} is not empty; choose another output, or replace it whole with --overwrite"]


def existing_parent(path: pathlib.Path) -> pathlib.Path:
    """The nearest folder above a path that exists."""
    return next(p for p in path.absolute().parents if p.exists())
