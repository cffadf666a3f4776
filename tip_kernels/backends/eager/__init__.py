"""The primitives in tiled torch: any device without Triton. They know tensors and numbers only."""
