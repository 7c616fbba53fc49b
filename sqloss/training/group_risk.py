"""The tail over groups: models trained on the groups that they do worst."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

import sqloss
from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.flags import as_flag, expect, flag, make_absolute
from sqloss.training.group_samplers import Communities, from_file
from sqloss.training.risks import RISKS, OfModel, Risk
from sqloss.training.samplers import has_come

if TYPE_CHECKING:
    from sqloss.training.loop import Training, TrainingData

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@RISKS.register
@dataclass(frozen=True)
class Group(Risk):
    r"""The superquantile of the groups' mean losses, each group of weight 1 whatever its size.

    With :math:`m_g` the mean of the losses of group g it is :math:`\mathrm{cvar}_\alpha(m)`:
    at ``alpha`` 0 every group alike, near 1 the worst group. Models are trained on
    :class:`RunningGroup`, an estimate of it from batches that have few samples of a small group.

    Source: S. Sagawa et al., "Distributionally robust neural networks for group shifts", ICLR 2020,
    for the worst group; the superquantile over groups lies between it and their mean.
    """

    name: ClassVar[str] = "group"
    needs: ClassVar[tuple[str, ...]] = ("rows",)
    keeps_state: ClassVar[bool] = True

    alpha: float = flag(0.8, "confidence level of --risk group, over the groups", since=3)
    groups: str = flag(
        "communities",
        "groups of --risk group: communities (of the encoder's means, as those of --sampling "
        "communities), labels, or FILE.npy with a whole number for each training sample",
        since=3,
    )
    groups_from: float = flag(
        0.5,
        "share of the training after which --groups communities are found; before, it is the mean",
        since=3,
    )
    group_decay: float = flag(
        0.95,
        "what a group's running mean keeps of the losses of before, whenever a batch has some of "
        "the group's samples",
        since=3,
    )

    def __post_init__(self) -> None:
        expect(self, "alpha", 0 <= self.alpha < 1, "a number in [0, 1)")
        is_file = self.groups.endswith(".npy")
        is_named = self.groups in ("communities", "labels")
        expect(self, "groups", is_named or is_file, "communities, labels or FILE.npy")
        expect(self, "groups_from", 0 <= self.groups_from < 1, "a number in [0, 1)")
        if self.groups != "communities" and self.groups_from != Group.groups_from:
            raise UserError(
                f"{as_flag('groups_from')}: expected {as_flag('groups')} communities with it, got "
                f"{as_flag('groups')} {self.groups}"
            )
        expect(self, "group_decay", 0 <= self.group_decay < 1, "a number in [0, 1)")
        if is_file:
            make_absolute(self, "groups")

    @property
    def words(self) -> str:
        of_groups = "mean" if self.alpha == 0 else f"CVaR {self.alpha:g}"
        return f"{of_groups} over {'groups' if self.groups.endswith('.npy') else self.groups}"

    def check(self, data: "TrainingData", training: "Training") -> None:
        if self.groups == "communities":
            if not training.feature_names:
                raise UserError(
                    f"{as_flag('groups')}: expected labels or FILE.npy, as the model has no "
                    "features to find communities in, got communities"
                )
        else:
            self.found(data, training)

    def found(self, data: "TrainingData", training: "Training") -> Tensor:
        """The number of each training sample's group, int64 [N]."""
        if self.groups == "communities":
            return Communities(min_stability=0.0).found_in(data, training)["groups"]
        if self.groups == "labels":
            if data.labels is None:
                raise UserError(f"{as_flag('groups')}: expected data with labels for labels")
            return data.labels
        numbers = from_file(self.groups, "groups")
        if numbers.dtype not in WHOLE or numbers.shape != (len(data),):
            raise UserError(
                f"{as_flag('groups')}: expected a whole number for each of {len(data)} training "
                f"samples, got {numbers.dtype} {' x '.join(map(str, numbers.shape))}"
            )
        return numbers.long()

    def of_model(self) -> "RunningGroup":
        return RunningGroup(self)

    def __call__(self, losses: Tensor, **needed: Tensor) -> Tensor:
        raise TypeError("the groups of a batch are known to RunningGroup, of_model()")


class RunningGroup(OfModel[Group]):
    r"""What a model is trained on by ``--risk group``: running means of its groups' losses.

    For each batch, of :math:`B` losses :math:`l_i` of samples of the groups :math:`g_i`:

    1. A group that the batch has samples of, :math:`n_g` with the sum of losses :math:`s_g`, takes
       them into its running sums: :math:`S_g \leftarrow \beta S_g + s_g` and
       :math:`N_g \leftarrow \beta N_g + n_g`, where :math:`\beta` is ``group_decay``. Its running
       mean is :math:`m_g = S_g / N_g`: every sample of about the last :math:`1 / (1 - \beta)`
       batches that had any, each alike, so that one with a single sample makes it no noisier. It
       is right from the first sample on. Other groups keep what they have.
    2. The weights of the groups, :math:`q = \arg\max \langle q, m \rangle` over
       :math:`0 \le q_g \le 1 / ((1 - \alpha) G), \sum_g q_g = 1`: those of
       :func:`sqloss.tail_weights` over the :math:`G` groups that have had a sample and that this
       epoch has any of.
    3. The value, with :math:`p_g` the share of the group in the samples of the epoch,

       .. math::
           \frac{1}{B} \sum_i \frac{q_{g_i}}{p_{g_i}} l_i .

    A sample stands for those of its group that the batch does not have: over the batches of an
    epoch these weights come to :math:`q_g` for each group, however rarely a batch has one of its
    samples, where the mean over the samples that are there would lose the groups that are not. So
    at given q the gradient is an unbiased estimate of that of :math:`\sum_g q_g E[l | g]`. Its
    variance grows with :math:`q_g / p_g`: the weight of a sample of a group of a hundredth of the
    data may be a hundred times that of the plain mean. q itself takes no gradient, as
    the gradient of a superquantile does not.

    The shares are those of what the epoch draws, so a sampler and this risk do not count a rare
    group twice: with ``--sampling balanced`` and ``--groups labels`` the samples weigh q alone.

    Before there are groups it is the mean. Over ranks it is that of all losses. Sums are in
    float64; on the CPU the same bits in every repetition.
    """

    name = Group.name
    needs = Group.needs
    keeps_state = Group.keeps_state

    def __init__(self, risk: Group) -> None:
        super().__init__(risk)
        self.groups: Tensor | None = None  # int64 [N], from 0 up without gaps
        self.shares = torch.empty(0)  # of the epoch, float64 [G]
        # The losses of each group and how many they are, both with a decay, [2, G].
        self.sums = torch.empty(2, 0, dtype=torch.float64)
        self.found: dict[str, Any] = {}  # what does not change any more

    def start_epoch(self, order: Tensor, data: "TrainingData", training: "Training") -> None:
        if self.groups is None:
            is_late = self.risk.groups == "communities"
            if is_late and not has_come(self.risk.groups_from, training):
                return
            found = ranks.of_first(lambda: self.risk.found(data, training))
            names, groups = found.unique(return_inverse=True)
            sums = torch.zeros(2, len(names), dtype=torch.float64)
            self.load_state_dict(
                {"groups": groups, "names": names, "sums": sums, "epoch": training.epoch}
            )
        assert self.groups is not None
        counts = torch.bincount(self.groups[order], minlength=self.sums.shape[1])
        self.shares = counts.double() / len(order)

    def __call__(self, losses: Tensor, **needed: Tensor) -> Tensor:
        if self.groups is None:
            return losses.mean()
        groups = self.groups[needed["rows"]].to(losses.device)
        self._take(losses.detach().double(), groups)
        weights = self.weights_of_groups().to(losses.device) / self.shares.to(losses.device)
        return (weights[groups].to(losses.dtype) * losses).mean()

    def _take(self, losses: Tensor, groups: Tensor) -> None:
        """Let a batch count in the running sums."""
        self.sums = self.sums.to(losses.device)
        of_batch = torch.zeros_like(self.sums)
        of_batch.index_add_(1, groups, torch.stack([losses, torch.ones_like(losses)]))
        is_there = of_batch[1] > 0
        kept = torch.where(is_there, self.risk.group_decay, 1.0)
        self.sums = self.sums * kept + of_batch

    def means(self) -> Tensor:
        """The running mean of each group, float64 [G]; NaN where it has had no sample."""
        return self.sums[0] / self.sums[1]

    def weights_of_groups(self) -> Tensor:
        """What each group counts now, float64 [G]."""
        counts = (self.sums[1] > 0) & (self.shares > 0).to(self.sums.device)
        return sqloss.tail_weights(self.means(), self.risk.alpha, mask=counts)

    def described(self) -> dict[str, Any]:
        if self.groups is None or not (self.sums[1] > 0).any():
            return {}
        columns = {
            "group": self.found["names"],
            "size": torch.bincount(self.groups),
            "mean_loss": self.means(),
            "weight": self.weights_of_groups(),
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return {
            "since_epoch": self.found["epoch"] + 1,
            "groups": [
                {**dict(zip(columns, row, strict=True)), "mean_loss": finite_or_none(row[2])}
                for row in rows
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        return {} if self.groups is None else self.found | {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.found = {name: value for name, value in state.items() if name != "sums"}
        if state:
            self.groups, self.sums = state["groups"], state["sums"]


def finite_or_none(value: float) -> float | None:
    """A number as JSON has it: none of a group that has had no sample."""
    return value if math.isfinite(value) else None
