"""What can be read from frozen features by a linear classifier."""
