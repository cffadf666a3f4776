"""Callables with the names and arguments of other libraries, by this package: swap the import and nothing else."""
