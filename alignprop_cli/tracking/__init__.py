"""Experiment trackers, each in a process of its own: the run writes a file, the process reads it.

Read `spool.py` (what is written), `follow.py` (the run's side), `child.py` (the process),
`backends.py` (the trackers).
"""
