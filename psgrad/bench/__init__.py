"""Measuring per-sample gradients against the ordinary gradient and against others' ways."""
