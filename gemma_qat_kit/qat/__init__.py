"""Training with quantization in the loop: prepare, train, convert, on the grids that ship."""
