"""A small convolutional classifier: the instrument that sees which class a generated image shows.

Train it on the training images from before any imbalance is applied: an instrument that had itself
hardly seen a class would overlook that class in the generated images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqloss.models.pixels import Images, in_blocks, pixels
from sqloss.models.seeding import generator, initialisation

# A fixed number of steps rather than of epochs: the time is the same for 1,000 images as for
# 100,000, and enough for 98-99 % accuracy on handwritten digits of either size.
STEPS = 1000
BATCH_SIZE = 128
PEAK_LR = 5e-3
PREDICTION_BATCH_SIZE = 1000
FEATURES = 32 * 4 * 4


class Classifier(nn.Module):
    """Two convolutions and a linear layer: pixels [B, C, H, W] to logits [B, classes].

    ``features`` are what the linear layer sees, [B, FEATURES].
    """

    def __init__(self, data_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.features = nn.Sequential(
            nn.Conv2d(data_shape[0], 16, kernel_size=3, padding=1),
            nn.MaxPool2d(tuple(min(2, side) for side in data_shape[1:])),  # one stays one
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(4),  # any image size ends as 4 x 4
            nn.Flatten(),
        )
        self.logits = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.features(x))
        return logits

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The most likely class of each image of pixels, [B]."""
        return torch.cat([self(batch).argmax(1) for batch in x.split(PREDICTION_BATCH_SIZE)])

    @torch.no_grad()
    def predict_attributes(self, x: Tensor) -> Tensor:
        """Which attributes each image of pixels likely has, bool [B, classes]."""
        return torch.cat([self(batch) > 0 for batch in x.split(PREDICTION_BATCH_SIZE)])

    @torch.no_grad()
    def see(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features [B, FEATURES] and class probabilities [B, classes] of images of pixels."""
        features = torch.cat([self.features(batch) for batch in x.split(PREDICTION_BATCH_SIZE)])
        return features, self.logits(features).softmax(1)


def train_classifier(images: Images, labels: Tensor, classes: int, seed: int) -> Classifier:
    """Fit a classifier to uint8 images [N, C, H, W], on the device where they are.

    Args:
        labels: the class of each image, int64 [N]; or, of attributes of which an image has any,
            which it has, bool [N, classes].
    """
    with initialisation(seed, "classifier"):
        classifier = Classifier(tuple(images.shape[1:]), classes).to(images.device)
    optimiser = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LR, total_steps=STEPS)
    draws = generator(seed, "classifier", "batches")
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH_SIZE,), generator=draws).to(images.device)
        # torch's own, and its mean: an instrument does not depend on what it is to measure
        logits, truth = classifier(pixels(images[batch])), labels[batch]
        if labels.dtype == torch.bool:
            loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits))
        else:
            loss = F.cross_entropy(logits, truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return classifier


def accuracy(classifier: Classifier, images: Images, labels: Tensor) -> float:
    """The share of uint8 images whose class the classifier gets right."""
    blocks = in_blocks(images, PREDICTION_BATCH_SIZE)
    seen = torch.cat([classifier.predict(pixels(block)) for block in blocks])
    return (seen == labels).double().mean().item()


def attribute_accuracies(classifier: Classifier, images: Images, labels: Tensor) -> list[float]:
    """For each attribute the share of uint8 images of which the classifier gets it right."""
    blocks = in_blocks(images, PREDICTION_BATCH_SIZE)
    seen = torch.cat([classifier.predict_attributes(pixels(block)) for block in blocks])
    return (seen == labels.to(seen.device)).double().mean(0).tolist()
