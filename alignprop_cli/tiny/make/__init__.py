"""The scripts that trained the embedded model; not in the wheel."""
