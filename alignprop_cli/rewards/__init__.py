"""Rewards: images in [0, 1] and prompts to one number per image, higher is better.

Read base.py (the contract), pixel.py (the simplest), registry.py (names and options), mixture.py
(several at once, and their losses); then frozen.py and a reward with a network, such as clip.py.
"""
