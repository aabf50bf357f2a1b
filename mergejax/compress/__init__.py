"""Compressed deltas: encode, decode, their size, and files."""

from mergejax.compress.files import fingerprint, load, save
from mergejax.compress.packed import Packed, Size, decode, encode, size
from mergejax.compress.trees import deltas, restore

__all__ = [
    "Packed",
    "Size",
    "decode",
    "deltas",
    "encode",
    "fingerprint",
    "load",
    "restore",
    "save",
    "size",
]
