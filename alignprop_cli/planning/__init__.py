"""What fits the memory and how a step is divided."""
