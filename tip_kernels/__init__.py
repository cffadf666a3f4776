"""tip_kernels: measure, select, learn."""
