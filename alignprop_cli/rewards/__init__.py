"""Rewards turn images in [0, 1] and their prompts into one number per image, higher is better.

Start with base.py (the contract), pixel.py (the simplest rewards), registry.py (names and options)
and mixture.py (several rewards and their losses). Then read frozen.py and a reward with a network,
such as clip.py.
"""
