"""Several processes, usually one a host: how they meet, agree and stop."""
