"""Fine-tune text-to-image diffusion models by backpropagating a reward through the sampling chain."""

__version__ = "0.1.0"
