"""Bad input: one sentence for every problem, of the ValueError family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj


def model(number, dtype=np.float32):
    return {
        "block_0": {"kernel": np.full((2, 3), number, dtype), "bias": np.full(3, number, dtype)},
        "block_1": {"kernel": np.full((2, 3), number, dtype)},
    }


BASE, A, B = model(0.0), model(1.0), model(2.0)


def without(tree, block, leaf):
    return {**tree, block: {n: x for n, x in tree[block].items() if n != leaf}}


def with_leaf(tree, block, leaf, value):
    return {**tree, block: {**tree[block], leaf: value}}


def merge(method="ties()", base=BASE, experts=(A, B), **options):
    return lambda: mj.merge(method, base, list(experts), **options)


def fisher(*trees, **options):
    return merge("fisher()", None, (A, B), stats={"fisher": list(trees)}, **options)


def gram(*grams):
    return merge("regmean()", None, (A, B), stats={"gram": list(grams)})


# What is done, and what every sentence of the refusal says, one sentence after the other.
CASES = {
    # Methods and their parameters.
    "unknown method": (lambda: mj.parse("tie(density=0.2)"), [("'tie'", "did you mean 'ties'")]),
    "unknown stage in a chain": (
        lambda: mj.parse("dropp(0.9)|ties()"),
        [("'dropp'", "did you mean 'drop'")],
    ),
    "unknown parameter": (
        lambda: mj.ties(densty=0.2),
        [("ties()", "'densty'", "did you mean 'density'")],
    ),
    "unknown parameters": (
        lambda: mj.parse("ties(densty=0.2, scalng=1)"),
        [("'densty'", "'density'"), ("'scalng'", "'scaling'")],
    ),
    "a parameter of a method without": (
        lambda: mj.average(weights=1),
        [("average()", "'weights'", "no parameters")],
    ),
    "too many arguments": (lambda: mj.slerp(0.5, 0.5), [("slerp(t)", "too many")]),
    "unknown choice": (
        lambda: mj.ties(scope="modle"),
        [("scope", "'modle'", "did you mean 'model'")],
    ),
    "density zero": (lambda: mj.ties(density=0), [("density", "(0, 1]", "not 0")]),
    "density above one": (lambda: mj.ties(density=20), [("density", "(0, 1]", "not 20")]),
    "density not a number": (lambda: mj.ties(density=np.nan), [("density", "(0, 1]", "nan")]),
    "density a text": (lambda: mj.ties(density="0.2"), [("density", "number", "'0.2'")]),
    "density a switch": (lambda: mj.ties(density=True), [("density", "number", "True")]),
    "one density of several": (lambda: mj.ties(density=[0.2, 1.2]), [("density", "not 1.2")]),
    "a density in a rule": (
        lambda: mj.ties(density=mj.by_name({"a": 0.2, ".*": mj.by_depth([0.1, 3])})),
        [("density", "not 3")],
    ),
    "several values out of range": (
        lambda: mj.dare(rate=1.5, scaling=np.inf),
        [("rate", "[0, 1]", "1.5"), ("scaling", "inf")],
    ),
    "rate below zero": (lambda: mj.drop(rate=-0.1), [("rate", "[0, 1]", "-0.1")]),
    "negative Fisher weight": (lambda: mj.fisher(weights=[1, -1]), [("weights", "not -1")]),
    "shrink above one": (lambda: mj.regmean(shrink=1.1), [("shrink", "[0, 1]", "1.1")]),
    "alpha above one": (lambda: mj.opcm(alpha=2), [("alpha", "[0, 1]", "2")]),
    "a switch that is a number": (
        lambda: mj.linear(normalize=1),
        [("normalize", "bool", "1")],
    ),
    "weights that sum to zero": (
        lambda: mj.linear(weights=[1, -1]),
        [("sums to zero", "normalize=False")],
    ),
    "votes that cancel": (
        lambda: mj.della(weights=[1, -1]),
        [("della(weights=[1, -1]) sums to zero", "change the weights")],
    ),
    "exact cut over the model": (
        lambda: mj.trim(cut="exact"),
        [("cut='exact'", "scope='tensor'")],
    ),
    "weights of another number of experts": (
        merge("linear(weights=[1, 2, 3])", None),
        [("weights", "3", "2 experts")],
    ),
    "three models for slerp": (merge("slerp()", None, (A, B, A)), [("exactly 2", "not 3")]),
    "several scalings behind the reduction": (
        merge("total()|scale(scaling=[1, 2])"),
        [("scaling", "has 2 numbers", "give one")],
    ),
    "a rule for a whole-model number": (
        merge("ties(density=by_depth([0.1, 0.3]))"),
        [("density", "whole model", "scope='tensor'")],
    ),
    "a rule that matches no leaf": (
        merge(mj.task_arithmetic(scaling=mj.by_name({"attention": 0.1, ".*": 0.3}))),
        [("'attention'", "matches no leaf")],
    ),
    "a leaf that no rule matches": (
        merge(mj.task_arithmetic(scaling=mj.by_name({"kernel": 0.1}))),
        [("'block_0/bias'", "'.*'")],
    ),
    "a broken pattern in a rule": (
        lambda: mj.by_name({"(": 0.1}),
        [("'('", "regular expression")],
    ),
    "a rule without values": (lambda: mj.by_depth([]), [("by_depth", "at least one")]),
    # The string language.
    "empty text": (lambda: mj.parse(" "), [("text",)]),
    "unfinished text": (lambda: mj.parse("ties(density=0.2"), [("cannot be read",)]),
    "a number for a method": (merge(0.3), [("0.3",)]),
    "code": (lambda: mj.parse("__import__('os').getcwd()"), [("not a method",)]),
    "an expression": (lambda: mj.parse("ties(density=min(1, 2))"), [("'min'",)]),
    "a comprehension": (lambda: mj.parse("ties(density=[x for x in (1,)])"), [("not a value",)]),
    "unpacking": (lambda: mj.parse("ties(**{'density': 1})"), [("'**'",)]),
    "a value for a method": (lambda: mj.parse("by_depth([1, 2])"), [("not a method",)]),
    "a stage that is none": (lambda: mj.chain(mj.ties(), "drop()"), [("chain()", "'drop()'")]),
    "a second reduction": (
        merge("total()|disjoint_mean()"),
        [("'disjoint_mean'", "already reduced")],
    ),
    "a refinement without a reduction": (
        merge("lines_multi_task()"),
        [("'lines_multi_task'", "reduces")],
    ),
    "an unknown role": (
        lambda: mj.by_role(kernal=mj.mean(), otherwise=mj.mean()),
        [("'kernal'", "did you mean 'kernel'")],
    ),
    "a name that is taken": (lambda: mj.register("ties", mj.ties), [("'ties'", "taken")]),
    "an undeclared method": (lambda: mj.register("mine", lambda: None), [("'mine'", "@mj.method")]),
    # Models.
    "no expert": (merge(experts=()), [("no expert",)]),
    "one tree for the list of experts": (
        lambda: mj.merge("average()", None, A),
        [("list of trees",)],
    ),
    "an empty tree": (merge("average()", None, ({},)), [("expert '0'", "no leaves")]),
    "a number in a tree": (
        merge("average()", None, (with_leaf(A, "block_0", "bias", 0.5),)),
        [("'block_0/bias'", "expert '0'", "float")],
    ),
    "no base": (merge(base=None), [("'ties'", "needs a base")]),
    "a missing leaf": (
        merge(experts=(A, without(B, "block_1", "kernel")), names=["math", "code"]),
        [("expert 'code'", "'block_1/kernel'")],
    ),
    "every leaf that differs": (
        merge(
            experts=(
                without(A, "block_0", "bias"),
                with_leaf(B, "block_1", "scale", np.ones(3, np.float32)),
                with_leaf(A, "block_0", "kernel", np.ones((3, 2), np.float32)),
                with_leaf(A, "block_1", "kernel", np.ones((2, 3), np.float16)),
            )
        ),
        [
            ("expert '0'", "'block_0/bias'"),
            ("expert '1'", "'block_1/scale'"),
            ("expert '2'", "'block_0/kernel'", "(3, 2)", "(2, 3)"),
            ("expert '3'", "'block_1/kernel'", "float16", "float32"),
        ],
    ),
    "a renamed leaf": (
        merge(
            experts=(
                with_leaf(
                    without(A, "block_1", "kernel"), "block_1", "kernal", A["block_1"]["kernel"]
                ),
            )
        ),
        [
            ("'block_1/kernal'", "the other models lack"),
            ("'block_1/kernel'", "did you mean 'block_1/kernal'"),
        ],
    ),
    "NaN in the base": (
        merge(base=with_leaf(BASE, "block_0", "bias", np.asarray([0, np.nan, 0], np.float32))),
        [("'block_0/bias'", "base", "1 non-finite")],
    ),
    "NaN and infinity in two experts": (
        merge(
            experts=(
                with_leaf(A, "block_0", "bias", np.full(3, -np.inf, np.float32)),
                with_leaf(B, "block_1", "kernel", np.full((2, 3), np.nan, np.float32)),
            ),
            names=["math", "code"],
        ),
        [
            ("'block_0/bias'", "expert 'math'", "3 non-finite"),
            ("'block_1/kernel'", "expert 'code'", "6 non-finite"),
        ],
    ),
    "a result that is not finite": (
        merge("task_arithmetic(scaling=3e38)", experts=(B, B)),
        [
            ("'block_0/bias'", "non-finite", "after merging"),
            ("'block_0/kernel'",),
            ("'block_1/kernel'",),
        ],
    ),
    "a result too large for its type": (
        merge("task_arithmetic(scaling=1e5)", model(0, np.float16), (model(1, np.float16),)),
        [("after merging",)] * 3,
    ),
    "integers that differ": (
        merge(
            "average()",
            None,
            (
                with_leaf(A, "block_0", "ids", np.arange(2)),
                with_leaf(B, "block_0", "ids", np.ones(2, np.int64)),
            ),
        ),
        [("'block_0/ids'", "int64", "exclude='block_0/ids'")],
    ),
    # Options.
    "a pattern that matches no leaf": (merge(exclude="heads?"), [("'heads?'", "matches no leaf")]),
    "several patterns that match no leaf": (
        merge(exclude=["head"], roles={"norm": "norm"}),
        [("'head'", "matches no leaf"), ("'norm'", "matches no leaf")],
    ),
    "a broken pattern": (merge(exclude="(["), [("'(['", "regular expression")]),
    "stacked layers that do not exist": (merge(scanned="layers"), [("'layers'", "no leaf")]),
    "an unknown role of a leaf": (
        merge(roles={"kernel": "kernl"}),
        [("'kernl'", "did you mean 'kernel'")],
    ),
    "an unknown layout": (merge(layout="pytorch"), [("'pytorch'", "did you mean 'torch'")]),
    "an unknown layout of a leaf": (merge(layouts={"kernel": "oii"}), [("'oii'",)]),
    "what to count": (merge(count="chnged"), [("'chnged'", "did you mean 'changed'")]),
    "too few names": (merge(names=["a"]), [("1 names", "2 experts")]),
    "one name twice": (merge(names=["a", "a"]), [("one name",)]),
    # Statistics.
    "no Fisher information": (merge("fisher()", None), [("fisher()", "'fisher'", "stats=")]),
    "no Gram matrices": (merge("regmean()", None), [("regmean()", "'gram'", "stats=")]),
    "Fisher information of one expert": (fisher(A), [("stats['fisher']", "1 trees", "2 experts")]),
    "Fisher information that lacks a leaf": (
        fisher(A, without(B, "block_1", "kernel")),
        [("stats['fisher'][1]", "'block_1/kernel'")],
    ),
    "Fisher information of a leaf that nobody has": (
        fisher(*({"block_0/kernl": np.ones((2, 3), np.float32), **A} for _ in range(2))),
        [("'block_0/kernl'", "did you mean 'block_0/kernel'")],
    ),
    "misspelled statistic": (
        merge("regmean()", None, stats={"gramm": [A, B]}),
        [("'gramm'", "did you mean 'gram'")],
    ),
    "Fisher information of another shape": (
        fisher(*(with_leaf(A, "block_1", "kernel", np.ones((3, 2), np.float32)) for _ in range(2))),
        [("'block_1/kernel'", "'fisher'", "(3, 2)", "(2, 3)")],
    ),
    "a Gram matrix of another shape": (
        gram(*({"block_1/kernel": np.eye(3, dtype=np.float32)} for _ in range(2))),
        [("'block_1/kernel'", "'gram'", "(3, 3)")],
    ),
    "NaN in the Fisher information": (
        fisher(A, model(np.nan)),
        [("'fisher'", "non-finite")] * 3,
    ),
    "negative Fisher information": (
        fisher(A, model(-1.0)),
        [("'fisher'", "negative")] * 3,
    ),
    "a parameter twice": (
        lambda: mj.parse("ties(density=0.1, density=0.2)"),
        [("'density'", "twice")],
    ),
    "seed above 32 bits": (merge(seed=2**32), [("seed",)]),
    "seed a fraction": (merge(seed=1.5), [("seed",)]),
    "unknown type": (merge(dtype="flot32"), [("dtype", "'flot32'")]),
    "an integer type": (merge(dtype="int32"), [("dtype", "int32")]),
    "names that are no texts": (merge(names=[1, 2]), [("names",)]),
    "weights that sum to zero in a rule": (
        merge("mean(weights=[1, -1])", None),
        [("non-finite", "weights that sum to zero")] * 3,
    ),
    "an axis meaning that is unknown": (
        merge("opcm()", roles={"bias": "kernel"}),
        [("'block_0/bias'", "layout")],
    ),
}


def refused(call, sentences):
    with pytest.raises(mj.MergeError) as error:
        call()
    assert isinstance(error.value, ValueError)
    lines = str(error.value).split("\n")
    assert len(lines) == len(sentences), str(error.value)
    for line, words in zip(lines, sentences, strict=True):
        for word in words:
            assert word in line
        assert not line.endswith(".")
        assert ". " not in line.replace("...", "")


@pytest.mark.parametrize(("call", "sentences"), CASES.values(), ids=CASES)
def test_is_refused_in_words(call, sentences):
    refused(call, sentences)


def test_an_unknown_name_of_the_module_suggests_one():
    with pytest.raises(AttributeError, match="did you mean 'ties'"):
        mj.tiess  # noqa: B018


def test_nothing_is_handed_on_when_an_input_is_bad():
    written = []
    broken = {"a": np.zeros(3, np.float32), "b": np.full(3, np.nan, np.float32)}
    for method in ("average()", "ties()"):
        with pytest.raises(mj.MergeError):
            mj.stream(
                method, None if method == "average()" else broken, [broken, {}], written.append
            )
    assert not written


def test_values_are_not_checked_under_a_trace():
    nan = with_leaf(A, "block_0", "bias", jnp.full(3, jnp.nan))
    merged = jax.jit(lambda expert: mj.merge("task_arithmetic(1.0)", BASE, [expert]))(nan)
    assert jnp.isnan(merged["block_0"]["bias"]).all()
