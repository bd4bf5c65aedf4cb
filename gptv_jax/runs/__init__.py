"""A run folder: who holds it, what it records, and its pictures."""
