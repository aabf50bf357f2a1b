"""`python -m mergejax` is the command `mergejax`."""

from mergejax.command import launch

launch()
