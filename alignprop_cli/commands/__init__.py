"""The four commands: each parses its options, calls one function and prints.

Read train.py first; options.py and settings.py hold what they share. Heavy imports happen inside.
"""
