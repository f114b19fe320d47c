"""The embedded model: a small Stable Diffusion of coloured shapes, made by make/build.py."""
