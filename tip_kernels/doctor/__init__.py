"""`tip-kernels doctor`: what is installed here, what will run, and whether its numbers are right on this device."""
