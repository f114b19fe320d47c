"""The scripts that made the embedded model; not in the wheel."""
