"""What is measured: heads, logits, top-k lists. All work comes by here, so versions are looked at here."""

from tip_kernels import _versions

_versions.check("torch", "triton")
