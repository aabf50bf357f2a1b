"""Config files of `mergejax merge`: the fields of a merge, with overrides from the command line."""

import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from mergejax.errors import MergeError, did_you_mean, raise_all

MODELS = ("method", "base", "experts", "out")
FIELDS = ("weights", "dtype", "seed", "memory", "shard_size", "overwrite", "only", "exclude",
          "format", "strict", "vocabulary", "layers", "stats")  # fmt: skip


def read_config(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of a config file after `--config.KEY=VALUE`, those that are None left out.

    Args:
        path: of a Python file with get_config(), an argument behind a colon.
        overrides: the arguments that are no flags of the command.

    Raises:
        MergeError: a key that the config or a merge does not have, a value of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    from mergejax.main import first_line

    file = path.partition(".py:")[0] + (".py" if ".py:" in path else "")
    if not pathlib.Path(file).is_file():
        raise MergeError(f"--config={path}: there is no such file")
    values = flags.FlagValues()
    command = ["mergejax", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is left beside it
    try:
        with warnings.catch_warnings():  # the library loads files in a way that is deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            rest = values(command)
        fields = dict(values["config"].value.to_dict())  # type: ignore[union-attr]
    except MergeError:
        raise
    except Exception as error:
        raise MergeError(f"--config={path}: {first_line(error)}") from None
    finally:
        sys.dont_write_bytecode = writes
    known = (*MODELS, *FIELDS)
    problems = [f"'{argument}' is no flag; see mergejax merge --help" for argument in rest[1:]]
    problems += [
        f"--config={path}: a merge has no field '{key}', {did_you_mean(key, known)}"
        for key in fields
        if key not in known
    ]
    raise_all(problems)
    return {key: value for key, value in fields.items() if value not in (None, "", ())}
