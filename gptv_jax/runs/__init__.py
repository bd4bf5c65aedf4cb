"""A run folder: who holds it, what it records, its report and pictures."""
