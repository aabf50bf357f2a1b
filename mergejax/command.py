"""The command `mergejax`: merge, check, average, inspect, convert, methods.

Bad input is answered with one sentence per problem on standard error and exit status 2, and
nothing is written; any other failure with one sentence and status 1. `--debug` shows where.
"""

import argparse
import json
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from mergejax.checkpoints.config_file import FIELDS, MODELS, read_config
from mergejax.errors import MergeError, raise_all

_EPILOG = "docs/checkpoints.md tells what is guaranteed; `mergejax methods` lists the methods."


class _Parser(argparse.ArgumentParser):
    """Answers bad arguments with a `MergeError`."""

    def error(self, message: str) -> NoReturn:
        raise MergeError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    shown = _Parser(add_help=False)
    shown.add_argument("--debug", action="store_true", help="show where a failure happened")
    parser = _Parser(
        "mergejax",
        allow_abbrev=False,
        description="Merges model checkpoints.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    merge = commands.add_parser("merge", parents=[shown], help="merge models into a new folder")
    _add_merge(merge)
    merge.add_argument(
        "--print-config", action="store_true", help="print the translated --mergekit and stop"
    )
    merge.add_argument("--quiet", action="store_true", help="say nothing but problems")
    check = commands.add_parser(
        "check", parents=[shown], help="say what merge would do, and every problem"
    )
    _add_merge(check)
    check.add_argument("--json", action="store_true", help="answer in JSON, every tensor listed")
    average = commands.add_parser(
        "average", parents=[shown], help="average steps of one training run"
    )
    average.add_argument("run", help="its folder; steps are folders such as 1000, step_1000")
    average.add_argument("--steps", default=":", metavar="A:B", help="or A,B,C; all by default")
    average.add_argument("--window", metavar="N", type=_integer, help="the last N of these alone")
    average.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    average.add_argument("--quiet", action="store_true", help="say nothing but problems")
    _add_result(average)
    inspect = commands.add_parser(
        "inspect", parents=[shown], help="say what experts changed, and how much they disagree"
    )
    inspect.add_argument("base", help="the model that the experts were fine-tuned from")
    inspect.add_argument("experts", nargs="+", metavar="expert", help="folders, files, adapters")
    inspect.add_argument("--out", metavar="DIR", help="folder for inspect.json and inspect.png")
    convert = commands.add_parser(
        "convert", parents=[shown], help="write a model in another file format"
    )
    convert.add_argument("source", help="a model, a Flax msgpack file, an Orbax folder")
    convert.add_argument("target", help="ends with .safetensors, .npz or .msgpack, else Orbax")
    convert.add_argument("--format", help="if the target's name does not say it")
    convert.add_argument("--layout", help="flax or torch: names and layouts of that framework")
    convert.add_argument("--config", metavar="FILE", help="a config.json, if the source has none")
    convert.add_argument("--ignore", metavar="REGEX", action="append", help="leave tensors out")
    convert.add_argument("--padding", default="error", help="rows beyond vocab_size: keep or drop")
    convert.add_argument("--memory", metavar="SIZE", default="256MiB", help="for transposed leaves")
    methods = commands.add_parser("methods", parents=[shown], help="list methods, or explain one")
    methods.add_argument("name", nargs="?", help="of a method or a piece")
    return parser


def _add_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", metavar="DIR", help="the model that the experts were fine-tuned from")
    add("--expert", metavar="DIR", action="append", dest="experts", help="a model or an adapter")
    add("--method", metavar="TEXT", help="such as 'ties(density=0.2)'")
    add("--out", metavar="DIR", help="the folder to write")
    _add_result(parser)
    add("--seed", metavar="N", type=_integer, help="of random masks; 0 by default")
    add("--vocabulary", metavar="CHOICE", help="rows of other tokens: error, base or union")
    add("--layers", metavar="A[0:8]", action="append", help="a range of the result's layers")
    add("--mergekit", metavar="FILE.yml", help="a configuration file of mergekit")
    add("--config", metavar="FILE.py", help="a config file; flags and --config.KEY=... come after")


_RESULT = ("weights", "dtype", "memory", "shard_size", "format", "overwrite", "only", "exclude",
           "strict")  # fmt: skip


def _add_result(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", metavar="W,W", type=_numbers, help="one number per model")
    add("--dtype", metavar="TYPE", help="of the result; by default the base's")
    add("--memory", metavar="SIZE", help="budget, such as 2GiB; by default half of what is free")
    add("--shard-size", metavar="SIZE", help="largest file; 5GB by default")
    add("--format", metavar="NAME", help="safetensors (the default), orbax, msgpack or npz")
    add("--overwrite", action="store_true", default=None, help="replace what stands at --out")
    add("--only", metavar="REGEX", action="append", help="merge these tensors alone")
    add("--exclude", metavar="REGEX", action="append", help="keep the base's for these tensors")
    add("--strict", action="store_true", default=None, help="warnings are errors")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers; write 0.5,0.5") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it must be an integer, not '{text}'") from None


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
    from mergejax.checkpoints import merge

    assert job is not None
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
    from mergejax.checkpoints import adapter_merge
    from mergejax.checkpoints.staging import place_problems

    lines: list[str] = []
    answer: dict[str, Any] = {"problems": [], "warnings": [], "notes": [], "forecast": {}}
    try:
        found = adapter_merge.prepare(request)
        answer["notes"] = [f"{found.sentence} can be merged into an adapter"]
        answer["forecast"] = {"disk_bytes": sum(map(len, found.files.values()))}
        lines = place_problems(request.out, request.overwrite) if request.out else []
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

    options = {name: getattr(given, name) for name in _RESULT if getattr(given, name) is not None}
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
    parser = _parser()
    given, extra = parser.parse_known_args(arguments)
    if given.command is None:
        parser.print_help()
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
