"""One run: what goes into it, the training, and its folder."""
