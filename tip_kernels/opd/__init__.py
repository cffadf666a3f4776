"""The on-policy loop: `tip-kernels opd`. Everything here needs the `opd` extra."""
