"""One optimiser step (trainer.py) and the run around it (run.py)."""
