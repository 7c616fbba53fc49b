"""``sqloss gan``: GANs on the mean and on the tail of their losses, and what becomes of classes."""
