"""What compares a method with its restatement in NumPy."""

import trees

import mergejax as mj


def made(method, options):
    """A registered method with its options, or a chain in the string language as it is."""
    return mj.METHODS[method].make(**options) if method in mj.METHODS else mj.parse(method)


def ids(cases):
    return [repr(made(method, options)) for _, method, _, options in cases]


def merged_and_restated(models, method, restated, options):
    """Both results, flat; the restatement gets (tree, base, experts, stats, **options)."""
    base, experts = models
    chain = mj.chain(made(method, options))
    stats = trees.statistics(chain.needs, experts)
    got = mj.merge(chain, base, experts, stats=stats)
    flat = trees.flat(base), [trees.flat(expert) for expert in experts]
    return trees.flat(got), restated(base, *flat, stats, **options)
