"""The command `mergejax`: merge, check, average, inspect, convert, methods.

Bad input is answered with one sentence per problem on standard error and exit status 2, and
nothing is written; any other failure with one sentence and status 1. `--debug` shows where.
"""

import argparse
import json
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from mergejax import flags
from mergejax.checkpoints.config_file import FIELDS, MODELS, read_config
from mergejax.errors import MergeError, raise_all


def _request(given: argparse.Namespace, extra: Sequence[str]) -> Any:
    """The request that flags and the config describe together; a flag comes before the config."""
    from mergejax.checkpoints.request import make_request

    fields: dict[str, Any] = {}
    if given.config:
        fields = read_config(given.config, extra)
    elif extra:
        raise MergeError(f"'{extra[0]}' is no flag; see mergejax {given.command} --help")
    if given.mergekit:
        from mergejax.checkpoints.mergekit import read_mergekit

        fields |= read_mergekit(given.mergekit)
    for name in (*MODELS, *FIELDS):
        if getattr(given, name) is not None:
            fields[name] = getattr(given, name)
    models = {name: fields.pop(name, None) for name in MODELS}
    models["experts"] = models["experts"] or []
    return make_request(**models, **fields)


def config_of(request: Any) -> str:
    """A request as a command line of this library, one option a line."""
    options = {"base": request.base, "method": request.method, "dtype": request.dtype}
    lines = [f"--{name} {shlex.quote(str(x))}" for name, x in options.items() if x is not None]
    lines += [f"--expert {shlex.quote(str(expert))}" for expert in request.experts]
    ranges = ["+".join(map(str, sources)) for sources in request.layers]
    lines += [f"--layers {shlex.quote(text)}" for text in ranges]
    return "mergejax merge \\\n  " + " \\\n  ".join(lines)


def _merge(given: argparse.Namespace, extra: Sequence[str]) -> None:
    request = _request(given, extra)
    if given.print_config:
        print(config_of(request))
        return
    if request.out is None:
        raise MergeError("there is no output; name a folder with --out")
    from mergejax.checkpoints import adapter_merge
    from mergejax.checkpoints.job import prepare
    from mergejax.progress import Printer, Silent

    reporter = Silent() if given.quiet else Printer()
    if adapter_merge.applies(request):
        adapter_merge.run(request, reporter)
        return
    job, problems, _ = prepare(request)
    raise_all(problems.sentences())
    from mergejax import compiled
    from mergejax.checkpoints import merge

    assert job is not None
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled.keep_in(compiled.user_folder())
    merge.run(job, reporter)


def _check(given: argparse.Namespace, extra: Sequence[str]) -> int:
    request = _request(given, extra)
    from mergejax.checkpoints import adapter_merge, compare
    from mergejax.checkpoints.job import prepare

    if adapter_merge.applies(request):
        return _check_adapters(given, request)
    job, problems, odd = prepare(request)
    forecast, notes = {}, list(job.notes) if job is not None else []
    if job is not None:
        from mergejax.checkpoints import forecast as forecasts
        from mergejax.checkpoints import merge

        forecast = forecasts.forecast(job)
        problems.lines += merge.target_problems(job)
    sentences = problems.sentences()
    if given.json:
        every: list[Any] = [{"problem": line} for line in problems.lines]
        every += compare.as_json(problems.findings)
        answer = {"problems": every, "warnings": odd, "notes": notes, "forecast": forecast}
        print(json.dumps(answer, indent=2))
    else:
        for line in odd:
            print(f"warning: {line}", file=sys.stderr)
        for line in notes:
            print(line)
        if forecast:
            print(forecasts.sentence(forecast))
    raise_all([] if given.json else sentences)
    return 2 if sentences else 0


def _check_adapters(given: argparse.Namespace, request: Any) -> int:
    from mergejax.checkpoints import adapter_merge, target

    lines: list[str] = []
    answer: dict[str, Any] = {"problems": [], "warnings": [], "notes": [], "forecast": {}}
    try:
        found = adapter_merge.prepare(request)
        answer["notes"] = [f"{found.sentence} can be merged into an adapter"]
        answer["forecast"] = {"disk_bytes": sum(map(len, found.files.values()))}
        lines = target.problems(request.out, request.overwrite) if request.out else []
    except MergeError as error:
        lines = str(error).splitlines()
    answer["problems"] = [{"problem": line} for line in lines]
    print(json.dumps(answer, indent=2) if given.json else "\n".join(answer["notes"]))
    raise_all([] if given.json else lines)
    return 2 if lines else 0


def _methods(given: argparse.Namespace) -> None:
    from mergejax import reference

    print(reference.table() if given.name is None else reference.entry(given.name))


def _inspect(given: argparse.Namespace) -> None:
    from mergejax.checkpoints import inspect

    found = inspect.inspect(given.base, given.experts)
    print(inspect.table(found))
    if given.out is not None:
        inspect.write(found, pathlib.Path(given.out))


def _average(given: argparse.Namespace) -> None:
    from mergejax.checkpoints.average import average_checkpoints
    from mergejax.progress import Printer

    options = {
        name: getattr(given, name) for name in flags.RESULT if getattr(given, name) is not None
    }
    reporter = None if given.quiet else Printer()
    average_checkpoints(
        given.run, given.out, given.steps, window=given.window, reporter=reporter, **options
    )


def _convert(given: argparse.Namespace) -> None:
    from mergejax.checkpoints import convert
    from mergejax.checkpoints.request import read_size

    try:
        memory = read_size(given.memory)
    except ValueError:
        raise MergeError(f"--memory must be a size such as 2GiB, not '{given.memory}'") from None
    target = convert.convert(
        given.source,
        given.target,
        given.format,
        layout=given.layout,
        config=given.config,
        ignore=given.ignore or (),
        padding=given.padding,
        memory=memory,
        say=print,
    )
    print(f"{target} is written")


def run(arguments: Sequence[str]) -> int:
    """Does what a command line says and returns the exit status."""
    reader = flags.parser()
    given, extra = reader.parse_known_args(arguments)
    if given.command is None:
        reader.print_help()
        return 0
    plain = {
        "methods": _methods,
        "inspect": _inspect,
        "convert": _convert,
        "average": _average,
    }
    if given.command in plain:
        raise_all([f"'{argument}' is no flag" for argument in extra])
        plain[given.command](given)
        return 0
    if given.command == "check":
        return _check(given, extra)
    _merge(given, extra)
    return 0


def launch(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command; turns what goes wrong into a sentence and an exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = run(arguments)
    except MergeError as error:
        _trace(arguments)
        print(error, file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        status = 1
    except Exception as error:
        _trace(arguments)
        print(explain(error), file=sys.stderr)
        status = 1
    sys.exit(status)


def _trace(arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()


def explain(error: Exception) -> str:
    """One sentence for what went wrong.

    Example:
        >>> explain(OSError(28, "No space left on device"))
        'the run failed (OSError: [Errno 28] No space left on device); --debug shows where'
    """
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    first = next(iter(str(error).strip().splitlines()), "")
    if notes:
        return (
            f"the run failed ({type(error).__name__}: {first}){notes}; the same command continues"
        )
    return f"the run failed ({type(error).__name__}: {first}); --debug shows where"
