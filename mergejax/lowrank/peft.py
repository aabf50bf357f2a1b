"""Adapters as Hugging Face PEFT stores them, and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax.errors import raise_all
from mergejax.lowrank.factors import Adapter, Factors, folded

_PREFIX = "base_model.model."
# Fields of PEFT's configuration that make of LoRA something else.
_VARIANTS = (
    "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "megatron_config",
)  # fmt: skip
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")


def from_peft(state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Factors]:
    r"""An adapter from PEFT's state dict and configuration.

    .. math:: \Delta W = s\,B A,\qquad s=\alpha/r \ \text{or}\ \alpha/\sqrt r

    Args:
        state: arrays by name, 'base_model.model.LAYER.lora_A.weight' ([r, in]) and
            'base_model.model.LAYER.lora_B.weight' ([out, r]).
        config: r, lora_alpha, use_rslora, rank_pattern and alpha_pattern are read.

    Returns:
        Factors by the name of the base's leaf, 'LAYER.weight'.

    Raises:
        MergeError: what LoRA of linear layers does not have (DoRA, embeddings, convolutions, saved
            modules, biases), an A without its B, or a rank that is not the configuration's.

    Example:
        >>> state = {'base_model.model.q.lora_A.weight': np.ones((1, 3), np.float32),
        ...          'base_model.model.q.lora_B.weight': np.ones((2, 1), np.float32)}
        >>> adapter = from_peft(state, {'r': 1, 'lora_alpha': 2})
        >>> adapter['q.weight'].down.shape, adapter['q.weight'].scale
        ((3, 1), 2.0)
    """
    problems = _configuration_problems(config)
    sides: dict[str, dict[str, Any]] = {}
    for key, x in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"'{key}' is no LoRA factor of a linear layer; merge it by itself")
        elif len(x.shape) != 2:
            problems.append(
                f"'{key}' has shape {tuple(x.shape)}, but factors of linear layers have two axes; "
                "leave convolutions out"
            )
        else:
            sides.setdefault(match[1], {})[match[2]] = x
    adapter = {}
    for layer, pair in sides.items():
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            problems.append(f"layer '{layer}' has no lora_{missing}; load the whole state dict")
            continue
        rank = _at(config.get("rank_pattern"), layer, config.get("r"))
        alpha = _at(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
        if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            problems.append(
                f"layer '{layer}' has lora_A {tuple(pair['A'].shape)} and lora_B "
                f"{tuple(pair['B'].shape)}, but the configuration says rank {rank}; take the "
                "configuration that belongs to the weights"
            )
        elif not problems:
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            adapter[f"{layer}.weight"] = Factors(pair["A"].T, pair["B"].T, scale)
    raise_all(problems)
    return adapter


def _configuration_problems(config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"the configuration has no '{name}'; pass PEFT's adapter_config.json as a dict"
        for name in ("r", "lora_alpha")
        if name not in config
    ]
    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": (None, "LORA"),
        "use_dora": (None, False),
        "bias": (None, "none"),
        # Others take something out of the base's weights when the adapter is begun.
        "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    }
    allowed |= dict.fromkeys(_VARIANTS, (None, False, [], {}))
    return problems + [
        f"the configuration has {name}={config[name]!r}, but plain LoRA is read; merge the weights "
        "of such models instead"
        for name, values in allowed.items()
        if config.get(name) not in values
    ]


def _at(pattern: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """PEFT's rule: a pattern holds for layers whose name ends with it."""
    matches = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matches, default)


def to_peft(
    adapter: Adapter, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PEFT's state dict and configuration of an adapter.

    All layers get the largest rank, padded with zeros; scales are folded in, so that the
    configuration's own is 1.

    Args:
        adapter: factors by leaf name, such as 'LAYER.weight'.
        config: fields to keep, such as those of the adapters that were merged.

    Returns:
        float32 arrays by PEFT's names, and the configuration with r, lora_alpha, use_rslora,
        patterns and target_modules set.

    Example:
        >>> adapter = {'q.weight': Factors(np.ones((3, 1)), np.ones((1, 2)), 2.0)}
        >>> state, config = to_peft(adapter)
        >>> state['base_model.model.q.lora_B.weight'].tolist(), config['lora_alpha']
        ([[2.0], [2.0]], 1)
    """
    rank = max(factors.rank for factors in adapter.values())
    state = {}
    layers = []
    for name, factors in adapter.items():
        layer = name.removesuffix(".weight")
        down, up = (np.asarray(x) for x in folded(factors))
        missing = rank - factors.rank
        a, b = np.pad(down, ((0, 0), (0, missing))).T, np.pad(up, ((0, missing), (0, 0))).T
        # safetensors writes the bytes as they lie in memory.
        state[f"{_PREFIX}{layer}.lora_A.weight"] = np.ascontiguousarray(a)
        state[f"{_PREFIX}{layer}.lora_B.weight"] = np.ascontiguousarray(b)
        layers.append(layer)
    own = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": layers,
    }
    return state, {**(config or {}), **own}
