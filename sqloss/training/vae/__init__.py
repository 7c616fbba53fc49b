"""``sqloss vae``: VAEs on the mean and on the tail of their loss, and what can be asked of them."""
