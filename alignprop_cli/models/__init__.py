"""The base models, and the only importer of diffusers.

Read base.py (the contract), families.py (which model is of which family, and how it is opened),
then unet.py (a family); meta.py plans without weights.
"""
