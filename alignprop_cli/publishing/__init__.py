"""What leaves this machine: files for other programs, the model card, the hub.

results.py puts them together at the end of a command. export.py writes LoRAs and merged models for
others, card.py the README.md beside an adapter, from facts.py and from what was measured, and
push.py uploads. shared.py says what a file that is given away tells about where it was made.
"""
