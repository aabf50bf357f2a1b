"""NumPy's npz files: where each array lies, so that it can be read in pieces."""

import pathlib
import zipfile
from typing import IO

import numpy as np

from mergejax.checkpoints.safetensors import CODES, Tensor
from mergejax.errors import MergeError, raise_all


def read_npz(path: pathlib.Path) -> dict[str, Tensor]:
    """The arrays of an npz file by name; none of their values is read.

    Raises:
        MergeError: the file is damaged or compressed, or an array is of a foreign type or in the
            order of columns.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            found, problems = {}, []
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if entry.compress_type != zipfile.ZIP_STORED:
                    problems.append(f"{path}: '{name}' is compressed; save it with np.savez")
                    continue
                tensor, problem = _array(path, file, entry.header_offset)
                problems += [f"{path}: '{name}' {problem}"] if problem else []
                found[name] = tensor
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}); check the file") from None
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise MergeError(f"{path} is no readable npz file ({error}); save it again") from None
    raise_all(problems)
    return found


def _array(path: pathlib.Path, file: IO[bytes], place: int) -> tuple[Tensor, str]:
    """One array of the archive, and what is wrong with it."""
    file.seek(place + 26)
    lengths = file.read(4)
    skip = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    file.seek(place + 30 + skip)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, columns, dtype = read[version](file)
    tensor = Tensor(path, dtype, shape, file.tell())
    end = path.stat().st_size
    if dtype not in CODES:
        return tensor, f"is of the foreign type {dtype}; cast it first"
    if columns and len(shape) > 1:
        return tensor, "is stored in the order of columns; save np.ascontiguousarray of it"
    return tensor, "" if tensor.offset + tensor.bytes <= end else "ends behind the file"
