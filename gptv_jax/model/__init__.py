"""The network. No I/O, and nothing here knows data, training or stages."""
