"""What each command does, for the command line and for Python (api/): one function each.

They take plain values and a console, which gets the result. What they raise is in errors.py, and
nothing here ends the process. Read train.py first.
"""
