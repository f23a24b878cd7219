"""distillbench: a benchmark suite for diffusion distillation."""

__version__ = "0.1.0"
