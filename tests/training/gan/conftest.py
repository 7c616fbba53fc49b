import pytest

from sqloss.common.flags import configure
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.loop import begin


@pytest.fixture
def trainer(make_trainer):
    """Trainings of small GANs on random images of 8 x 8 pixels."""
    config = configure(
        GANConfig, epochs=4, batch_size=20, width=2, latent=3, num_samples=40, imbalance="none"
    )
    return make_trainer(begin, config, (8, 8))
