"""Fine-tune text-to-image diffusion models by backpropagating a reward through sampling."""

__version__ = "0.1.0"
