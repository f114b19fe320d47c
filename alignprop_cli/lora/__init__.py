"""The trained weights. Read factors.py first, then layers.py.

layers.py puts them into a network; files.py finds, reads and writes them, with formats.py for the
names that others give their tensors. soup.py makes soups by recipe.py, with mixing.py's arithmetic.
"""
