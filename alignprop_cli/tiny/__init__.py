"""The embedded model: a small Stable Diffusion of coloured shapes, trained by make/build.py."""
