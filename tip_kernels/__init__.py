"""tip_kernels: measure, select, learn."""

from tip_kernels.backends import backend
from tip_kernels.sources import Head
from tip_kernels.stats import TokenStats, token_stats
