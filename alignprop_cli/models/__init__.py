"""Adapters to the base models: the only importer of diffusers."""
