"""The trained weights.

layers.py puts them into a network, files.py reads and writes them, mixing.py makes soups.
"""
