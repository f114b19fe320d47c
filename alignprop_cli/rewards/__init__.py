"""Rewards turn images in [0, 1] and their prompts into one number per image, higher is better.

Start with base.py (the contract), pixel.py (the simplest rewards), catalogue.py (the shipped ones
and their options), registry.py (names) and mixture.py (several rewards and their losses). Then read
frozen.py and a reward with a network, such as clip.py.
"""
