"""The trained weights. Read factors.py (what a LoRA is), then layers.py (a LoRA in a network).

files.py finds, reads and writes LoRA files, with formats.py and original.py for the names and
settings.py for the configurations of others. A soup starts in recipe.py (what is asked for), goes
through soup.py (its members) and is computed in mixing.py.
"""
