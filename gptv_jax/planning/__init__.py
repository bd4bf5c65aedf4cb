"""What a configuration costs on hardware that is not there: memory, traffic, time."""
