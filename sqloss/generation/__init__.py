"""``sqloss sample``: images by the models of a run, from their own prior or from a fitted one."""
