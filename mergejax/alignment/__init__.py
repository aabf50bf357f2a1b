"""Networks that were not fine-tuned from one base: their symmetries, and how they are aligned."""

from mergejax.alignment.activations import activation_matching
from mergejax.alignment.assignment import assign
from mergejax.alignment.derive import symmetries
from mergejax.alignment.dimat import average_neighbours, merge_neighbours, mesh_of, senders
from mergejax.alignment.features import Features, merge_features
from mergejax.alignment.fusion import layerwise_transport, optimal_transport
from mergejax.alignment.gauge import lock, unlock
from mergejax.alignment.heads import Attention, attentions
from mergejax.alignment.maps import Maps, transport
from mergejax.alignment.mixtures import (
    Routing,
    align_experts,
    group_experts,
    merge_experts,
    routing,
)
from mergejax.alignment.mixtures_compressed import (
    Split,
    kept_share,
    low_rank_and_rest,
    prune,
)
from mergejax.alignment.partial import cost, keep_apart, ratios_for
from mergejax.alignment.permutations import apply, compose, identity, invert, random
from mergejax.alignment.places import apart
from mergejax.alignment.repair import reestimate, repair
from mergejax.alignment.sinkhorn import coupling, ott_coupling
from mergejax.alignment.stats import regression, statistics
from mergejax.alignment.straight_through import straight_through
from mergejax.alignment.structure import Group, Symmetries
from mergejax.alignment.verify import verify
from mergejax.alignment.weights import Matching, match_many, weight_matching
from mergejax.alignment.zipping import zip_units

__all__ = [
    "Attention",
    "Features",
    "Group",
    "Maps",
    "Matching",
    "Routing",
    "Split",
    "Symmetries",
    "activation_matching",
    "align_experts",
    "apart",
    "apply",
    "assign",
    "attentions",
    "average_neighbours",
    "compose",
    "cost",
    "coupling",
    "group_experts",
    "identity",
    "invert",
    "keep_apart",
    "kept_share",
    "layerwise_transport",
    "lock",
    "low_rank_and_rest",
    "match_many",
    "merge_experts",
    "merge_features",
    "merge_neighbours",
    "mesh_of",
    "optimal_transport",
    "ott_coupling",
    "prune",
    "random",
    "ratios_for",
    "reestimate",
    "regression",
    "repair",
    "routing",
    "senders",
    "statistics",
    "straight_through",
    "symmetries",
    "transport",
    "unlock",
    "verify",
    "weight_matching",
    "zip_units",
]
