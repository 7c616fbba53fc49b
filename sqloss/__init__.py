"""sqloss: train PyTorch models on the worst tail of the loss instead of its mean.

sqloss.cvar(losses, alpha=0.8)              # the mean of the worst 20 % of the losses
sqloss.cvar_cross_entropy(x, y, alpha=0.8)  # the same, fused with the losses
sqloss.student_t_rsample_kl(5.0, loc, scale)  # heavy-tailed latents for a VAE, with their KL
"""

from pkgutil import extend_path

# The compiled sqloss._C lies where sqloss was installed; from a source tree that comes first on
# sys.path it is found there too.
__path__ = extend_path(__path__, __name__)

from sqloss import distributed as distributed
from sqloss import distributions as distributions
from sqloss import losses as losses
from sqloss import nn as nn
from sqloss import reference as reference
from sqloss._ops import __version__ as __version__
from sqloss._ops import show_config as show_config
from sqloss.losses import (
    cvar_binary_cross_entropy_with_logits as cvar_binary_cross_entropy_with_logits,
)
from sqloss.losses import cvar_cross_entropy as cvar_cross_entropy
from sqloss.losses import cvar_gaussian_nll_loss as cvar_gaussian_nll_loss
from sqloss.losses import cvar_mse_loss as cvar_mse_loss
from sqloss.losses import cvar_smooth_l1_loss as cvar_smooth_l1_loss
from sqloss.student_t import draw_seed as draw_seed
from sqloss.student_t import normal_rsample_kl as normal_rsample_kl
from sqloss.student_t import student_t_rsample as student_t_rsample
from sqloss.student_t import student_t_rsample_kl as student_t_rsample_kl
from sqloss.superquantile import cvar as cvar
from sqloss.superquantile import superquantile as superquantile
from sqloss.superquantile import tail_weights as tail_weights
from sqloss.superquantile import value_at_risk as value_at_risk
from sqloss.tail import tail_backward as tail_backward
from sqloss.tail import tail_indices as tail_indices
from sqloss.tail import tail_loss as tail_loss

__all__ = [
    "cvar",
    "cvar_binary_cross_entropy_with_logits",
    "cvar_cross_entropy",
    "cvar_gaussian_nll_loss",
    "cvar_mse_loss",
    "cvar_smooth_l1_loss",
    "distributed",
    "distributions",
    "draw_seed",
    "losses",
    "nn",
    "normal_rsample_kl",
    "reference",
    "show_config",
    "student_t_rsample",
    "student_t_rsample_kl",
    "superquantile",
    "tail_backward",
    "tail_indices",
    "tail_loss",
    "tail_weights",
    "value_at_risk",
]
