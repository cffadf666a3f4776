"""The same primitives as `eager`, in Triton. Tensors and numbers only; nothing here needs a GPU to be imported."""
