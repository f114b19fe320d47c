"""What a run is asked to do, and what is wrong with that. No torch.

Read schema.py (every option), then presets.py (where the values come from), validation.py (all
problems in one message) and trust.py (what a configuration of somebody else may name).
"""
