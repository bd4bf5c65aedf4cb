"""Drawing sequences of tokens with a key/value cache, and scoring them."""
