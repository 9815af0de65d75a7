"""Code that is copied into exported checkpoints."""
