"""See which tokens matter: a page of rollouts, the report of a run, runs side by side. Needs the `opd` extra.

`save_statistics` writes what a training loop of your own has measured; `tip-kernels inspect FILE` shows it.
"""

from tip_kernels.inspect.tokens import TokenTable, save_statistics

__all__ = ["TokenTable", "save_statistics"]
