"""What a run is asked to do: the schema, the presets, and what is wrong with them. No torch."""
