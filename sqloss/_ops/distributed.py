"""The superquantile over ranks, by its kernel or, on devices without one, by the reference.

It is no operator of torch's dispatcher: it runs collectives, which no transform of torch.func and
no fake tensor can.
"""

from sqloss.reference import distributed_superquantile as distributed_superquantile
