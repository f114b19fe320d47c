"""What fits the memory, and how a step is divided.

Read meter (what a piece of work needs), footprint (each part of a step), estimate (the whole step),
plan (the choice), probe (the choice tried on the device), request (all that from a configuration).
"""
