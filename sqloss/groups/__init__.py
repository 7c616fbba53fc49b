"""Groups of samples without labels, and how often to draw each: what is rare, by where it lies.

features [N, D] -> groups [N] (communities, clusters) or scores [N] (leverage, density)
                -> probabilities [N]
"""

from sqloss.groups.communities import communities as communities
from sqloss.groups.communities import stability as stability
from sqloss.groups.merging import merge_groups as merge_groups
from sqloss.groups.neighbours import nearest_neighbours as nearest_neighbours
from sqloss.groups.neighbours import neighbour_graph as neighbour_graph
from sqloss.groups.partitions import clusters as clusters
from sqloss.groups.probabilities import effective_sample_size as effective_sample_size
from sqloss.groups.probabilities import keep_min_draw as keep_min_draw
from sqloss.groups.probabilities import power_of_share as power_of_share
from sqloss.groups.probabilities import probabilities as probabilities
from sqloss.groups.probabilities import score_probabilities as score_probabilities
from sqloss.groups.sampler import CommunitySampler as CommunitySampler
from sqloss.groups.scores import density as density
from sqloss.groups.scores import leverage as leverage

__all__ = [
    "CommunitySampler",
    "clusters",
    "communities",
    "density",
    "effective_sample_size",
    "keep_min_draw",
    "leverage",
    "merge_groups",
    "nearest_neighbours",
    "neighbour_graph",
    "power_of_share",
    "probabilities",
    "score_probabilities",
    "stability",
]
