"""Sample with fixed prompts and seeds, compare with the base model, and show the result.

Read run.py first, then draw.py (sampling), compare.py (statistics), results.py (the folder and what
is printed), sheet.py and page.py (images and HTML).
"""
