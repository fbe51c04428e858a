"""Models: families, loading and saving, packed attention, loss, generation."""
