"""Rewards of image files.

Read files.py (find and decode), captions.py and embedded.py (the prompt of a file), scorer.py
(measure), rows.py (write), run.py (all of these together), report.py (what is shown at the end).
"""
