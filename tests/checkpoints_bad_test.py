"""Every bad input is answered by one sentence a problem, status 2, and nothing else happens."""

import json
import re
import struct

import disk_models
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mergejax import command
from mergejax.checkpoints import folder

EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.0.q_proj.weight"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


class Case:
    """Models in a folder, and the command line that is to be refused."""

    def __init__(self, root):
        self.root = root
        self.base, self.a, self.b = disk_models.family(root)
        self.out = root / "out"
        self.method = "average()"
        self.more = []

    @property
    def experts(self):
        return [self.a, self.b]

    def arguments(self):
        experts = [x for expert in self.experts for x in ("--expert", expert)]
        models = ["--base", self.base, *experts] if self.base else experts
        return [*models, "--method", self.method, "--out", self.out, *self.more]

    def change(self, model, **tensors):
        held = load_file(model / folder.SINGLE)
        for name, x in tensors.items():
            if x is None:
                del held[name]
            else:
                held[name] = x
        disk_models.write(model, held)

    def header(self, change, model=None):
        """Rewrites the header of a file; `change` edits the parsed one."""
        path = (model or self.a) / folder.SINGLE
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        change(header)
        path.write_bytes(disk_models.raw(header, content[8 + size :]))

    def shard(self, model=None):
        model = model or self.a
        held = load_file(model / folder.SINGLE)
        (model / folder.SINGLE).unlink()
        disk_models.write(model, held, shards=2)
        return model / folder.INDEX


def put(x, index, value):
    x = x.copy()
    x.reshape(-1)[index] = value
    return x


def values(case, model, name):
    return load_file(model / folder.SINGLE)[name]


def set_path(name):
    def change(case):
        setattr(case, name, case.root / "absent")

    return change


def empty_folder(case):
    case.a = case.root / "nothing"
    case.a.mkdir()


def write_file(content):
    return lambda case: (case.a / folder.SINGLE).write_bytes(content)


def truncate(case):
    path = case.a / folder.SINGLE
    path.write_bytes(path.read_bytes()[:-10])


def append(case):
    path = case.a / folder.SINGLE
    path.write_bytes(path.read_bytes() + b"0123456789")


def entry(**fields):
    return lambda case: case.header(lambda header: header[QUERY].update(fields))


def twice(case):
    path = case.a / folder.SINGLE
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + size].rstrip()
    one = b',"model.norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}'
    path.write_bytes(disk_models.raw(text[:-1] + one, content[8 + size :]))


def overlap(case):
    def change(header):
        first, last = header[QUERY]["data_offsets"]
        header[QUERY]["data_offsets"] = [first - 2, last - 2]

    case.header(change)


def gap(case):
    case.header(lambda header: header.pop(QUERY))


def lose_a_shard(case):
    index = case.shard()
    (index.parent / "model-00002-of-00002.safetensors").unlink()


def lose_a_tensor(case):
    index = case.shard()
    content = json.loads(index.read_text())
    content["weight_map"]["model.absent"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))


def hide_a_tensor(case):
    index = case.shard()
    content = json.loads(index.read_text())
    del content["weight_map"][EMBED]
    index.write_text(json.dumps(content))


def leave_the_folder(case):
    index = case.shard()
    content = json.loads(index.read_text())
    content["weight_map"][EMBED] = "../base/model.safetensors"
    index.write_text(json.dumps(content))


def name_a_tensor_twice(case):
    index = case.shard()
    one = f'"{EMBED}": "model-00002-of-00002.safetensors"'
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{{one}, '))


def point_a_shard(case):
    index = case.shard()
    (index.parent / "model-00002-of-00002.safetensors").write_bytes(POINTER)


def break_the_index(case):
    case.shard().write_text("{")


def leave_a_stale_index(case):
    held = load_file(case.a / folder.SINGLE)
    disk_models.write(case.a, held, shards=2)


def rebuild(**options):
    return lambda case: disk_models.write(case.b, disk_models.weights(2, **options))


def lack(case):
    case.change(case.b, **{QUERY: None})


def extra(case):
    case.change(case.b, **{"model.more": np.ones(2, np.float32)})


def transpose(case):
    tall = "model.layers.0.up_proj.weight"
    case.change(case.b, **{tall: np.ascontiguousarray(values(case, case.b, tall).T)})


def turn_a_square(case):
    case.change(case.b, **{QUERY: np.ascontiguousarray(values(case, case.b, QUERY).T)})
    case.more = ["--strict"]


def spoil(model, value):
    def change(case):
        path = getattr(case, model)
        case.change(path, **{QUERY: put(values(case, path, QUERY), 3, value)})
        case.method = "ties(density=0.1)"

    return change


def overflow(case):
    large = np.full((10, 6), 1e30, disk_models.BF16)
    for path in (case.base, case.a, case.b):
        case.change(path, **{EMBED: put(large, 0, ord(path.name[-1]))})
    case.more = ["--dtype", "float16"]


def method(text, *more):
    def change(case):
        case.method, case.more = text, list(more)

    return change


def flag(*more):
    return lambda case: setattr(case, "more", list(more))


def integers(case):
    for i, path in enumerate((case.base, case.a, case.b)):
        case.change(path, table=np.arange(3) + (i == 2))


def counters_as_floats(case):
    for path, dtype in ((case.base, np.int64), (case.a, np.float32), (case.b, np.int64)):
        case.change(path, table=np.arange(3).astype(dtype))


def quantised(case):
    for path in (case.base, case.a, case.b):
        case.change(path, **{"model.layers.0.q_proj.qweight": np.arange(3, dtype=np.int32)})


def quantised_by_config(case):
    (case.a / "config.json").write_text('{"quantization_config": {"bits": 4}}')


def same_path(case):
    case.b = case.a


def same_content(case):
    disk_models.write(case.b, load_file(case.a / folder.SINGLE))


def same_path_by_a_link(case):
    case.b = case.root / "link"
    case.b.symlink_to(case.a)


def out_is_a_link(case):
    case.out.symlink_to(case.root / "elsewhere")


def out_lies_below_a_file(case):
    (case.root / "file").write_text("mine")
    case.out = case.root / "file" / "new" / "out"


def config(line):
    """A config file with one line of its own."""

    def change(case):
        path = case.root / "config.py"
        text = "import ml_collections\ndef get_config():\n  c = ml_collections.ConfigDict()\n"
        path.write_text(f"{text}  {line}\n  return c\n")
        case.more = ["--config", path]

    return change


def equal_to_base(case):
    disk_models.write(case.b, load_file(case.base / folder.SINGLE))
    case.more = ["--strict"]


def out_is(place):
    def change(case):
        case.out = place(case)

    return change


def out_is_a_file(case):
    case.out.write_text("mine")


def out_is_full(case):
    case.out.mkdir()
    (case.out / "mine.txt").write_text("mine")


def inputs_lie_inside(case):
    case.out = case.root


def no_base(case):
    case.base, case.method = None, "ties()"


CASES = {
    "a missing base": (set_path("base"), r"absent: there is no such file or folder"),
    "a missing expert": (set_path("b"), r"absent: there is no such file or folder"),
    "an empty folder": (empty_folder, r"nothing is an empty folder"),
    "an empty file": (write_file(b""), r"expert0/model.safetensors is empty; download"),
    "a git-lfs pointer": (
        write_file(POINTER),
        r"model.safetensors is a git-lfs pointer.*'git lfs pull'",
    ),
    "a shard that is a git-lfs pointer": (point_a_shard, r"00002.safetensors is a git-lfs pointer"),
    "an index that is a git-lfs pointer": (
        lambda case: case.shard().write_bytes(POINTER),
        r"index.json is a git-lfs pointer; run 'git lfs pull'",
    ),
    "a config that is a git-lfs pointer": (
        lambda case: (case.a / "config.json").write_bytes(POINTER),
        r"config.json is a git-lfs pointer; run 'git lfs pull'",
    ),
    "a file that is something else": (write_file(b"<!DOCTYPE html><html>" * 9), r"truncated or no"),
    "a short file": (write_file(b"\x10\0\0"), r"the file has 3 bytes"),
    "a truncated file": (truncate, r"tensor '.*' ends at byte .* but the file holds"),
    "a header longer than the file": (
        write_file(disk_models.raw({}, length=10**6)),
        r"less than its header claims",
    ),
    "a corrupt header": (write_file(disk_models.raw(b"{nonsense")), r"its header is corrupt"),
    "a header that is no text": (write_file(disk_models.raw(b"\xff\xfe{}")), r"header is corrupt"),
    "a header that claims 2^63 bytes": (
        write_file((2**63).to_bytes(8, "little") + b"{}" * 20),
        r"less than its header claims",
    ),
    "a header of no bytes": (write_file(bytes(8)), r"its header is corrupt"),
    "offsets that are no integers": (entry(data_offsets=[0.0, 72.0]), r"the impossible offsets"),
    "offsets before the start": (entry(data_offsets=[-72, 0]), r"the impossible offsets"),
    "a header nested without end": (
        write_file(disk_models.raw(b'{"a":' + b"[" * 100_000)),
        r"its header is corrupt",
    ),
    "a header that is a list": (write_file(disk_models.raw(b"[]")), r"header is no table"),
    "a file without tensors": (write_file(disk_models.raw({})), r"expert0 holds no tensors"),
    "an entry that is a number": (
        lambda case: case.header(lambda header: header.update({QUERY: 3})),
        rf"tensor '{QUERY}' has no dtype",
    ),
    "an unknown type": (entry(dtype="BF17"), rf"'{QUERY}' has the unknown type 'BF17', did you"),
    "a type that is a list": (entry(dtype=["BF16"]), rf"'{QUERY}' has the unknown type"),
    "a negative shape": (entry(shape=[-6, -6]), rf"'{QUERY}' has the impossible shape"),
    "a shape of booleans": (entry(shape=[True, 6]), rf"'{QUERY}' has the impossible shape"),
    "a shape that is too large": (entry(shape=[2**70, 6]), rf"'{QUERY}' of shape .* needs"),
    "a shape that does not fit": (entry(shape=[6, 5]), rf"'{QUERY}' of shape .* but its offsets"),
    "offsets the wrong way": (entry(data_offsets=[8, 4]), rf"'{QUERY}' ends at byte 4, before"),
    "offsets that are missing": (entry(data_offsets=[8]), rf"'{QUERY}' has the impossible offset"),
    "a name twice": (twice, r"it has 'model.norm.weight' twice"),
    "tensors that overlap": (overlap, r"overlap by 2 bytes"),
    "a gap between tensors": (gap, r"72 bytes between .* belong to no tensor"),
    "bytes behind the tensors": (append, r"10 bytes behind .* belong to no tensor"),
    "a shard that is missing": (lose_a_shard, r"model-00002-of-00002.safetensors is missing"),
    "a tensor that a shard lacks": (lose_a_tensor, r"00001.* lacks 'model.absent'"),
    "a tensor that the index lacks": (hide_a_tensor, rf"holds '{EMBED}', which .* does not say"),
    "an index that leaves its folder": (leave_the_folder, rf"'{EMBED}' lie in no file of this"),
    "a corrupt index": (break_the_index, r"model.safetensors.index.json is no JSON"),
    "an index that names a tensor twice": (name_a_tensor_twice, rf"it has '{EMBED}' twice"),
    "a stale file beside an index": (leave_a_stale_index, r"holds both"),
    "another width": (rebuild(width=8), r"expert 'expert1' has 8 tensors"),
    "another vocabulary": (
        rebuild(rows=12),
        rf"'expert1' has another vocabulary: '{EMBED}' of 12 rows instead of 10",
    ),
    "fewer layers": (rebuild(layers=1), r"'expert1' lacks 'model.layers.1.q_proj.weight'"),
    "a tensor that is missing": (lack, rf"'expert1' lacks '{QUERY}'; the base has it"),
    "a tensor too many": (extra, r"'expert1' has 'model.more', which the base lacks"),
    "a matrix stored transposed": (transpose, r"'expert1' stores .* transposed"),
    "a square matrix stored transposed": (
        turn_a_square,
        rf"nearer to the base's transpose than to the base in '{QUERY}'",
    ),
    "NaN in an expert": (
        spoil("b", np.nan),
        rf"'{QUERY}' of expert 'expert1' \(model.safetensors\) has 1 non-finite",
    ),
    "an infinity in the base": (spoil("base", -np.inf), rf"'{QUERY}' of the base .* 1 non-finite"),
    "an overflow of the output": (overflow, rf"'{EMBED}' of the merged model has 59 values beyond"),
    "an unknown method": (method("tis()"), r"no method is called 'tis', did you mean 'ties'"),
    "an unknown parameter": (method("ties(densty=0.2)"), r"no parameter 'densty', did you mean"),
    "a value out of range": (method("ties(density=1.5)"), r"must be in \(0, 1\], not 1.5"),
    "a value that is no number": (method("ties(density='x')"), r"must be a number"),
    "a value that is not finite": (method("ties(scaling=1e999)"), r"must be in"),
    "a method that cannot be read": (method("ties(density=0.2"), r"cannot be read"),
    "code in a method": (
        method("ties(density=__import__('os').system('touch out'))"),
        r"is not a method",
    ),
    "weights that sum to zero": (method("linear(weights=[1, -1])"), r"sums to zero"),
    "weights by flag that sum to zero": (method("linear()", "--weights", "1,-1"), r"sums to zero"),
    "a weight that is NaN": (method("linear()", "--weights", "nan,1"), r"must be in .* not nan"),
    "a weight that is infinite": (method("linear()", "--weights", "1,inf"), r"must be in .* inf"),
    "weights of the wrong length": (method("linear(weights=[1, 2, 3])"), r"has 3 numbers"),
    "weights by flag, too few": (method("linear()", "--weights", "1"), r"has 1 numbers"),
    "weights that are no numbers": (
        method("linear()", "--weights", "1,x"),
        r"'1,x' is no list of numbers",
    ),
    "weights for a method without": (method("slerp()", "--weights", "1,2"), r"no parameters 'weig"),
    "two experts too many": (method("passthrough()"), r"takes exactly 1 expert, not 2"),
    "no reduction": (method("drop(rate=0.5)"), r"end it with a reduction"),
    "no base": (no_base, r"needs a base"),
    "a pattern without a match": (flag("--exclude", "nothing"), r"'nothing' matches no leaf"),
    "a broken pattern": (flag("--only", "("), r"'\(' is not a regular expression"),
    "nothing left to merge": (flag("--exclude", "."), r"no tensor is left to merge"),
    "an unknown flag": (flag("--memry", "2GiB"), r"'--memry' is no flag"),
    "a type that does not exist": (flag("--dtype", "float17"), r"'float17' is no floating-point"),
    "a seed out of range": (flag("--seed", "-1"), r"seed must be an integer in"),
    "a seed that is no number": (flag("--seed", "x"), r"--seed: it must be an integer, not 'x'"),
    "too little memory": (flag("--memory", "1MB"), r"--memory 1\.0 MB is too little: .* 1\d\d MB"),
    "weights that cancel": (
        method("ties(weights=[1,-1])"),
        r"ties\(weights=\[1, -1\]\) sums to zero and cannot be normalised",
    ),
    "a memory that is no size": (flag("--memory", "lots"), r"memory must be a size"),
    "a shard size of nothing": (flag("--shard-size", "0GB"), r"shard_size must be a size"),
    "integers that differ": (integers, r"'expert1' has other integers.* in 'table'"),
    "integers that became floats": (counters_as_floats, r"'table' of type float32 instead of int"),
    "quantised weights": (quantised, r"the base is quantised: 'model.layers.0.q_proj.qweight'"),
    "a quantised model": (quantised_by_config, r"'expert0' is quantised by its config.json"),
    "one expert twice": (same_path, r"expert0 is given as an expert twice"),
    "one expert twice, once by a link": (same_path_by_a_link, r"is given as an expert twice"),
    "experts of equal content": (same_content, r"'expert0' and 'expert1' hold the same values"),
    "an expert equal to the base": (equal_to_base, r"'expert1' holds the base's values"),
    "an output that is a file": (out_is_a_file, r"out is not a folder"),
    "an output that is a link": (out_is_a_link, r"out is not a folder"),
    "an output below a file": (out_lies_below_a_file, r"file is not a folder; choose another out"),
    "an output without a name": (out_is(lambda case: ""), r"out: '' names no folder"),
    "an output that is the root": (out_is(lambda case: "/"), r"out: '/' names no folder"),
    "an output of too long a name": (
        out_is(lambda case: case.root / ("y" * 250)),
        r"out: the path .* cannot be used \(File name too long\)",
    ),
    "an expert without a name": (
        lambda case: setattr(case, "a", ""),
        r"an expert: '' names no folder",
    ),
    "an expert of too long a name": (
        lambda case: setattr(case, "a", "y" * 300),
        r"an expert: the path .* cannot be used \(File name too long\)",
    ),
    "an expert with a zero byte": (
        lambda case: setattr(case, "a", "a\0b"),
        r"an expert: the path .* cannot be used \(embedded null byte\)",
    ),
    "an unknown key of a config": (config("c.methd = 'ties()'"), r"no field 'methd', did you mean"),
    "a config that fails": (config("1 / 0"), r"config.py: division by zero"),
    "a config that is missing": (flag("--config", "nowhere.py"), r"nowhere.py: there is no such"),
    "an output that is in use": (out_is_full, r"out is not empty"),
    "an output that is an input": (out_is(lambda case: case.a), r"is or lies inside the input"),
    "an output inside an input": (out_is(lambda case: case.b / "x"), r"is or lies inside the inp"),
    "inputs inside the output": (inputs_lie_inside, r"lies inside the output"),
}


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as status:
        command.launch([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status.value.code, captured.err


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path, capsys):
    change, sentence = CASES[name]
    case = Case(tmp_path)
    change(case)
    before = disk_models.snapshot(tmp_path)
    status, err = refusal(capsys, "merge", *case.arguments(), "--quiet")
    assert status == 2, err
    assert re.search(sentence, err), err
    assert "Traceback" not in err
    assert all(line[-1] != "." and len(line) < 400 for line in err.splitlines())
    assert disk_models.snapshot(tmp_path) == before
    assert not list(tmp_path.glob(".*")), "something is left behind"


# What no header and no argument tells.
SEEN_WHILE_MERGING = {"NaN in an expert", "an infinity in the base", "an overflow of the output"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in SEEN_WHILE_MERGING])
def test_check_sees_it_before_any_work(name, tmp_path, capsys):
    change, sentence = CASES[name]
    case = Case(tmp_path)
    change(case)
    status, err = refusal(capsys, "check", *case.arguments())
    assert status == 2, err
    assert re.search(sentence, err), err


def test_parents_of_the_output_that_were_made_are_removed_again(tmp_path, capsys):
    case = Case(tmp_path)
    spoil("b", np.nan)(case)
    case.out = tmp_path / "new" / "deeper" / "out"
    status, _ = refusal(capsys, "merge", *case.arguments(), "--quiet")
    assert status == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "expert0", "expert1"]


def test_all_problems_are_told_at_once(tmp_path, capsys):
    case = Case(tmp_path)
    lack(case)
    case.method, case.out = "tis()", case.a / "x"
    status, err = refusal(capsys, "merge", *case.arguments())
    assert status == 2
    assert len(err.splitlines()) == 3


def mutated(content, random):
    """A file with some bytes changed, removed, doubled or cut off, mostly in its header."""
    content = bytearray(content)
    for _ in range(random.integers(1, 4)):
        size = int.from_bytes(content[:8], "little") if len(content) > 8 else 0
        end = min(len(content), 8 + size) if random.random() < 0.9 else len(content)
        place = int(random.integers(0, max(end, 1)))
        match random.integers(0, 4):
            case 0 if content:
                content[place % len(content)] = int(random.integers(0, 256))
            case 1:
                del content[place : place + int(random.integers(1, 9))]
            case 2:
                content[place:place] = content[place : place + int(random.integers(1, 40))]
            case _ if random.random() < 0.2:
                del content[place:]
    return bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_mutations_are_refused_or_harmless(seed, tmp_path):
    """No crash, no hang, and never another model than the reference library reads."""
    random = np.random.default_rng(seed)
    case = Case(tmp_path)
    case.shard()
    files = sorted(case.a.iterdir())
    originals = {path: path.read_bytes() for path in files}
    accepted = 0
    for _ in range(120):
        path = files[int(random.integers(len(files)))]
        path.write_bytes(mutated(originals[path], random))
        try:
            model = folder.open_model(case.a)
        except command.MergeError:
            pass
        else:
            accepted += 1
            there = {n: x for f in case.a.glob("*.safetensors") for n, x in load_file(f).items()}
            assert {n: (t.shape, t.dtype) for n, t in model.tensors.items()} == {
                n: (x.shape, x.dtype) for n, x in there.items()
            }
        path.write_bytes(originals[path])
    assert accepted < 60


def test_float8_that_is_not_finite(tmp_path, capsys):
    case = Case(tmp_path)
    for path in (case.base, case.a, case.b):
        code, x = "F8_E4M3", np.ones(4, ml_dtypes.float8_e4m3fn)
        x[1] = np.nan if path == case.b else ord(path.name[-1]) % 7 / 8
        header = {"w": {"dtype": code, "shape": [4], "data_offsets": [0, 4]}}
        (path / folder.SINGLE).write_bytes(disk_models.raw(header, x.tobytes()))
    status, err = refusal(capsys, "merge", *case.arguments(), "--quiet")
    assert (status, "has 1 non-finite values" in err) == (2, True)
