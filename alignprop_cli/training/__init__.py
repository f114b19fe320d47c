"""Training. Read trainer.py first: one optimiser step on one page.

run.py is the run around it: setup.py turns the configuration into values, callbacks.py says what
happens after each step, checkpoint.py and resume.py write a run and read it back.
"""
