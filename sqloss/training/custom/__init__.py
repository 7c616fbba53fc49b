"""Training of a user's own model on a user's own data: ``sqloss.training.train``."""
