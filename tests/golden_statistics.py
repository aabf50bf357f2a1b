"""Translations of recorded cases that learn from data or solve by iteration."""

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
