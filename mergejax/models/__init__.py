"""Flax models with their names in PyTorch: from a state dict or a folder to Flax, and back."""

from mergejax.models.catalogue import ARCHITECTURES as ARCHITECTURES
from mergejax.models.catalogue import build as build
from mergejax.models.catalogue import register as register
from mergejax.models.comparing import compare as compare
from mergejax.models.folders import load as load
from mergejax.models.folders import save as save
from mergejax.models.planning import Plan as Plan
from mergejax.models.planning import plan as plan
from mergejax.models.rules import Architecture as Architecture
from mergejax.models.rules import Config as Config
from mergejax.models.transfer import from_torch as from_torch
from mergejax.models.transfer import to_nnx as to_nnx
from mergejax.models.transfer import to_torch as to_torch
