"""Images in, batches of tokens out: the only folder that knows data sets and Grain."""
