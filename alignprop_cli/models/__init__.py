"""The base models, and the only importer of diffusers.

Read base.py (the contract), rows.py (one row per family), families.py (how a model is found and
opened), then unet.py (a family). loading.py asks the hub, meta.py builds a model without weights to
plan with.
"""
