import pytest

from sqloss.models.gan_losses import GAN_LOSSES
from sqloss.training.gan.stability import alarms, failures

WELL = {"d_loss_mean": 1.0, "d_spread": 1.0, "g_spread": 0.7}
SURE = {"d_loss_mean": 0.02}
LOST = "the discriminator has been all but sure of every image for 5 epochs"
SAME_LOGIT = "the discriminator has collapsed"
SAME_IMAGE = "the generator has collapsed"


def history(*changes, model="standard"):
    """A row per epoch: that of a training that goes well, with these changes."""
    return [
        {"epoch": epoch, "model": model} | WELL | change for epoch, change in enumerate(changes, 1)
    ]


def told(rows, loss="nonsaturating"):
    """The alarms of each epoch, as ``fit`` asks for them."""
    epochs = sorted({row["epoch"] for row in rows})
    return {
        epoch: found
        for epoch in epochs
        if (found := alarms([row for row in rows if row["epoch"] <= epoch], loss))
    }


def test_all_is_well():
    assert told(history(*[{}] * 8)) == {}
    assert failures(history({}, {}), "standard", "hinge") == {}


@pytest.mark.parametrize(
    ("change", "words"), [({"d_spread": 1e-3}, SAME_LOGIT), ({"g_spread": 0.05}, SAME_IMAGE)]
)
@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_a_collapse_is_told_once_each_time_that_it_begins(change, words, loss):
    found = told(history({}, change, change, {}, change), loss)
    assert list(found) == [2, 5]
    for epoch, [alarm] in found.items():
        assert alarm.startswith(f"epoch {epoch}: standard: {words}: it ")


@pytest.mark.parametrize("change", [{"d_spread": 1.1e-3}, {"g_spread": 0.051}])
def test_what_is_no_collapse_yet(change):
    assert told(history(change)) == {}


@pytest.mark.parametrize("change", [{"d_spread": 1e-4}, {"g_spread": 0.01}])
def test_what_begins_below_the_bar_has_some_epochs_to_rise(change):
    assert told(history(*[change] * 4, {})) == {}
    assert list(told(history(*[change] * 6))) == [5]


def test_a_discriminator_that_wins_for_five_epochs_is_told():
    found = told(history({}, *[SURE] * 6))
    assert list(found) == [6]
    assert LOST in found[6][0]
    assert "--lr-d" in found[6][0]


def test_a_discriminator_that_wins_at_first_is_not():
    assert told(history(*[SURE] * 4, {"d_loss_mean": 0.021}, *[SURE] * 4)) == {}


def test_a_critic_has_no_loss_of_0():
    assert told(history(*[{"d_loss_mean": -3.0}] * 9), "wgan-gp") == {}
    for loss in set(GAN_LOSSES) - {"wgan-gp"}:
        assert list(told(history(*[SURE] * 9), loss)) == [5]


def test_models_fail_each_by_itself():
    rows = history({}, {"g_spread": 0.0}, {"g_spread": 0.0, "d_spread": 0.0})
    rows += history({}, {}, {"g_spread": 0.0}, model="cvar")
    found = told(rows)
    assert list(found) == [2, 3]
    assert [alarm.split(":")[1:3] for alarm in found[2]] == [[" standard", f" {SAME_IMAGE}"]]
    assert [alarm.split(":")[1:3] for alarm in found[3]] == [
        [" standard", f" {SAME_LOGIT}"],
        [" cvar", f" {SAME_IMAGE}"],
    ]
    (same_image, same_logit) = failures(rows, "standard", "hinge").items()
    assert same_image[0].startswith(SAME_IMAGE) and same_image[1] == [2, 3]
    assert same_logit[0].startswith(SAME_LOGIT) and same_logit[1] == [3]
