"""Rewards: images in [0, 1] and prompts to one number per image, higher is better."""
