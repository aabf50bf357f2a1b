"""Translations of recorded cases that learn from data or solve by iteration."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from golden_case import Translation, Untranslatable

import mergejax as mj


def mats(case):
    take = case.parameters.take
    take("initialization", "average", ("average",))
    stats = {"gram": case.numbered("gram")}
    operator = "kfac" if take("use_backward", False) else "gram"
    if operator == "kfac":
        stats["output_gram"] = case.numbered("outgram")
    if any(len(several) != len(case.experts) for several in stats.values()):
        raise Untranslatable("there are not statistics of every expert")
    method = mj.mats(
        operator=operator,
        steps=take("num_iterations"),
        scaling=1 / len(case.experts),
        shrink=take("model_lambda"),
    )
    return Translation(method, case.base, case.experts, stats)


def localized(case):
    """Masks are learned here, on the recorded inputs and labels, and compared as well."""
    take = case.parameters.take
    options = {
        "density": take("sparsity"),
        "steepness": take("sigmoid_bias"),
        "learning_rate": take("learning_rate"),
        "epochs": take("num_train_epochs"),
        "l1": take("l1_strength"),
        "exclude": tuple(take("frozen")),
    }

    def loss(params, batch):
        x, labels = batch
        for name in ("fc0", "fc1", "fc2"):
            x = x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None, :]
            x = jax.nn.relu(x) if name != "fc2" else x
        chosen = jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=1)
        return -chosen.mean()

    def result():
        found, masks = {}, []
        data = zip(case.experts, case.numbered("inputs"), case.numbered("labels"), strict=True)
        for i, (expert, inputs, labels) in enumerate(data):
            x, y = jnp.asarray(inputs["x"]), jnp.asarray(labels["y"]).astype(jnp.int32)
            half = len(x) // 2
            batches = [(x[:half], y[:half]), (x[half:], y[half:])]
            mask, logits = mj.collect.localize(loss, case.base, expert, batches, **options)
            masks.append(mask)
            found |= {f"mask{i}": mask, f"logit{i}": logits}
        merged = mj.merge(
            mj.localize_and_stitch_trained(),
            case.base,
            case.experts,
            stats={"mask": masks},
            layout=case.layout,
        )
        return {"expected": merged, **found}

    return Translation(None, case.base, case.experts, result=result)


def regmean_plus_plus(case):
    """The blocks are the recorded network's three layers; names and layout become Flax's."""
    take = case.parameters.take
    method = mj.regmean(shrink=take("reduce_non_diagonal_ratio"))
    layers = ("fc0", "fc1", "fc2")

    def tree(flat):
        return {n: {"kernel": flat[f"{n}.weight"].T, "bias": flat[f"{n}.bias"]} for n in layers}

    def block(name):
        def apply(params, x):
            y = nn.Dense(params[name]["bias"].size).apply({"params": params[name]}, x)
            return y if name == "fc2" else nn.relu(y)

        return mj.Block((name,), apply)

    def result():
        data = [[jnp.asarray(inputs["x"])] for inputs in case.numbered("inputs")]
        experts = [tree(expert) for expert in case.experts]
        merged = mj.sequential(method, [block(n) for n in layers], None, experts, data)
        weights = {f"{name}.weight": layer["kernel"].T for name, layer in merged.items()}
        biases = {f"{name}.bias": layer["bias"] for name, layer in merged.items()}
        return {"expected": weights | biases}

    return Translation(None, case.base, case.experts, result=result)
