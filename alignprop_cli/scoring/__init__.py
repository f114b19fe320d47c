"""Reward models over a folder of images."""
