"""psgrad: per-sample gradients in PyTorch."""
