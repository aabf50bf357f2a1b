"""The flags of the command `mergejax`."""

import argparse
from typing import NoReturn

from mergejax.errors import MergeError

_EPILOG = "docs/checkpoints.md tells what is guaranteed; `mergejax methods` lists the methods."


class _Parser(argparse.ArgumentParser):
    """Answers bad arguments with a `MergeError`."""

    def error(self, message: str) -> NoReturn:
        raise MergeError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """What reads a command line; bad arguments are a `MergeError`."""
    shown = _Parser(add_help=False)
    shown.add_argument("--debug", action="store_true", help="show where a failure happened")
    found = _Parser(
        "mergejax",
        allow_abbrev=False,
        description="Merges model checkpoints.",
        epilog=_EPILOG,
    )
    commands = found.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
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
    return found


def _add_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", metavar="DIR", help="the model that the experts were fine-tuned from")
    add("--expert", metavar="DIR", action="append", dest="experts", help="a model or an adapter")
    add("--method", metavar="TEXT", help="such as 'ties(density=0.2)'")
    add("--out", metavar="DIR", help="the folder to write")
    _add_result(parser)
    add("--seed", metavar="N", type=_integer, help="of random masks; 0 by default")
    add("--vocabulary", metavar="CHOICE", help="rows of other tokens: error, base or union")
    add("--stats", metavar="FILE", action="append", help="of mj.collect.save; of each expert one")
    add("--layers", metavar="A[0:8]", action="append", help="a range of the result's layers")
    add("--mergekit", metavar="FILE.yml", help="a configuration file of mergekit")
    add("--config", metavar="FILE.py", help="a config file; flags and --config.KEY=... come after")


RESULT = ("weights", "dtype", "memory", "shard_size", "format", "overwrite", "only", "exclude",
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
