"""The launcher: python -m mergejax.main --config=configs/digits.py --workdir=runs/digits

Bad input is answered with one sentence per problem on standard error and exit status 2, and
nothing is written; any other failure with one sentence and status 1. `--debug` shows where.
"""

import importlib.util
import pathlib
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from mergejax import errors

CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Config file, with arguments behind a colon: configs/digits.py:runlocal"
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run makes.")
flags.DEFINE_bool("debug", False, "Whether failures show a traceback.")


def main(arguments: Sequence[str]) -> None:
    """Runs the job that the flags describe."""
    # Imported here, so that a mistyped flag is answered at once.
    import scipy.linalg  # noqa: F401, so that the library below is loaded
    import threadpoolctl

    from mergejax import alignment_studies, compiled, experiment, progress, study, suite, workdir
    from mergejax.eval import tables

    logging.set_verbosity(logging.ERROR)  # other libraries tell every step of a checkpoint
    if len(arguments) > 1:
        raise errors.MergeError(f"'{arguments[1]}' is no flag; flags start with --")
    folder = pathlib.Path(WORKDIR.value or "")
    workdir.check(folder)
    compiled.keep_in(folder / "cache")
    # Threads of LAPACK's own get into the way of XLA's: small decompositions take 15 times as long.
    threadpoolctl.threadpool_limits(limits=1, user_api="blas")
    book = workdir.Logbook(progress.Printer())
    flag = flags.FLAGS["config"]
    origin = {
        "file": pathlib.Path(config_flags.get_config_filename(flag)).name,
        "argument": _split_config(sys.argv[1:])[1],
        "overrides": config_flags.get_override_values(flag),
    }
    if "seeds" in CONFIG.value:
        print(suite.closing(suite.run(CONFIG.value, folder, book, origin), folder.as_posix()))
        return
    if "alignment" in CONFIG.value:
        alignment_studies.run(CONFIG.value, folder, book)
        print((folder / alignment_studies.TABLE).read_text(encoding="utf-8"))
        return
    if "study" in CONFIG.value:
        study.run(CONFIG.value, folder, book)
        print((folder / study.TABLE).read_text(encoding="utf-8"))
        return
    results = experiment.run(CONFIG.value, folder, book, origin)
    tables.show(results, sys.stdout)
    if results["verdict"]:
        book.log(results["verdict"]["sentence"])
        print(closing(sys.argv[1:], folder.as_posix(), results))


def closing(arguments: Sequence[str], folder: str, results: dict[str, Any]) -> str:
    """The last lines: the file to open, the command to merge again, Python that predicts.

    Args:
        arguments: of this run's command line.
        folder: the workdir as the user wrote it.
        results: what the run returned.
    """
    kept = re.sub(r"--?config\.methods[=\0][^\0]*\0", "", "".join(f"{a}\0" for a in arguments))
    methods = f"--config.methods={(results['verdict']['chain'],)!r}"
    command = " ".join(["python -m mergejax.main", *map(quoted, [*kept.split("\0")[:-1], methods])])
    task = next(iter(results["tasks"]))
    return (
        f"Open {folder}/results.md. To merge this run's experts again, with any chain:\n"
        f"  {command}\n"
        "To predict with the best merge:\n"
        "  from mergejax import experiment\n"
        f'  best = experiment.load("{folder}")\n'
        f'  print(best.predict(best.samples["{task}"], task="{task}"))'
    )


def quoted(argument: str) -> str:
    """Quotes a command line argument, where possible in the form that every shell reads.

    Example:
        >>> print(quoted("--seed=1"), quoted("--config.methods=('ties()',)"))
        --seed=1 "--config.methods=('ties()',)"
    """
    if re.fullmatch(r"[\w@%+=:,./-]+", argument):
        return argument
    return shlex.quote(argument) if set(argument) & set('"$`\\!') else f'"{argument}"'


def _split_config(arguments: Sequence[str]) -> tuple[str, str | None]:
    """The path of --config and the argument behind its colon."""
    for i, argument in enumerate(arguments):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            value = match[1] if match[1] is not None else "".join(arguments[i + 1 : i + 2])
            path, colon, rest = value.partition(".py:")
            return (path + ".py", rest) if colon else (value, None)
    return "", None


def _flat(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of a config's fields, groups of fields included."""
    names = []
    for key, value in config.items():
        names.append(prefix + key)
        if isinstance(value, ml_collections.ConfigDict):
            names += _flat(value, f"{prefix}{key}.")
    return names


def check(arguments: Sequence[str]) -> None:
    """Refuses what the flags library would answer with a traceback.

    Args:
        arguments: of the command line.

    Raises:
        MergeError: no or a missing config file or workdir, one that cannot be read, unknown keys.
    """
    path, argument = _split_config(arguments)
    problems = []
    if not path:
        problems.append("--config is missing; give a file, such as --config=configs/digits.py")
    elif not pathlib.Path(path).is_file():
        problems.append(f"--config={path}: there is no such file; give one of configs/")
    if not any(re.match(r"--?workdir\b", a) for a in arguments):
        problems.append("--workdir is missing; name a folder, such as --workdir=runs/digits")
    errors.raise_all(problems)
    known = _flat(_read(path, argument))
    keys = [m[1] for a in arguments if (m := re.match(r"--?(?:no)?config\.([^=]+)", a))]
    errors.raise_all(
        [
            f"the config has no key '{key}', {errors.did_you_mean(key, known)}"
            for key in keys
            if key not in known
        ]
    )


def _read(path: str, argument: str | None) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location("config_of_this_run", path)
    if spec is None or spec.loader is None:
        raise errors.MergeError(f"--config={path}: expected a Python file with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(*([] if argument is None else [argument]))
    except errors.MergeError:
        raise
    except Exception as error:
        raise errors.MergeError(
            f"--config={path} cannot be read ({type(error).__name__}: {first_line(error)}); "
            "it must define get_config(argument)"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or nothing."""
    return next(iter(str(error).strip().splitlines()), "")


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Reads the flags; refuses with one sentence per problem."""
    if not any(re.fullmatch(r"--?help\w*", argument) for argument in arguments):
        check(arguments[1:])
    try:
        return flags.FLAGS(list(arguments))
    except flags.Error as error:
        raise errors.MergeError(first_line(error)) from error


def launch() -> None:
    """Runs the program; turns what goes wrong into a sentence and an exit status."""
    try:
        app.run(main, flags_parser=parse_flags)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        status, sentence = explain(error)
        print(sentence, file=sys.stderr)
        sys.exit(status)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the sentence for what went wrong.

    Example:
        >>> explain(errors.MergeError("there is no expert to merge; pass at least one"))
        (2, 'there is no expert to merge; pass at least one')
        >>> explain(OSError("disk full"))
        (1, 'the run failed (OSError: disk full); --debug shows where')
    """
    if isinstance(error, errors.MergeError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 1, "interrupted; the same command continues"
    return 1, f"the run failed ({type(error).__name__}: {first_line(error)}); --debug shows where"


if __name__ == "__main__":
    launch()
