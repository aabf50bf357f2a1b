"""Linear algebra that merging methods share."""

from mergejax.linalg.solve import safe_solve

__all__ = ["safe_solve"]
