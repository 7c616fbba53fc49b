"""The GAN: what it generates, and how that is judged."""
