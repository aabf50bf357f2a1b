"""Merges that are more than a chain: what a study does to get each of them."""

from collections.abc import Callable, Mapping
from typing import Any

Right = Callable[[Any], Any]

# By name: (job, trained, calibration settings) -> what tells which images are classified rightly,
# and a text with the setting.
PROCEDURES: Mapping[str, Callable[..., tuple[Right, str]]] = {}
