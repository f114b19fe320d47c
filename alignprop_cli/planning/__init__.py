"""What fits the memory, and how a step is divided.

Read meter.py (what a piece of work needs), footprint.py (every part of a step), estimate.py (the
whole step), plan.py (the choice), probe.py (the choice tried on the device), then request.py (all
of it from a configuration).
"""
