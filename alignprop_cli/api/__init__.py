"""The functions for Python: `alignprop_cli.train` and the others, which are the commands' own.

functions.py has them and reward.py `load_reward`; given.py turns Python values into what commands
take, process.py keeps a call from changing anything else, results.py holds what is returned.
"""
