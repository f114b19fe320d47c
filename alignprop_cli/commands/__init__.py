"""The four commands: each parses its options, calls one function of bodies/ and prints.

Read train.py first. options.py holds the options that commands share, settings.py makes their
configuration, recorded.py reads the one that comes with weights. Heavy imports happen inside
functions, so that `--help` is quick.
"""
