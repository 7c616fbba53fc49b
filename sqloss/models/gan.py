"""A generative adversarial network by the guidelines of DCGAN (Radford, Metz & Chintala, 2016).

Images are in [-1, 1]. The discriminator halves them by strided convolutions, at least twice and
until no side is above 4, and one convolution covers what is left; the generator is its mirror
image, from the latent to the first map by one transposed convolution. There is neither pooling nor
a fully connected layer. Sides of any length work: a halved one is rounded up, and each side of a
kernel is 4 where that side of the larger map is even and 3 where it is odd, so that nothing is
cropped or padded further.

A generator may be told a class, as one-hot beside the latent, and continuous codes, which are to
become visible in the image (InfoGAN). How discriminator and generator are trained, and with which
of the losses in ``sqloss.models.gan_losses``, belongs to the objective, not to the model.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST_SIDE = 4  # of the maps deepest inside, at most
LEAST_HALVINGS = 2  # one hidden layer draws the 8 x 8 digits far worse
LEAKY_SLOPE = 0.2
WEIGHT_STD = 0.02
# The likelihood of codes that are read without error has no bound, and its gradient grows with the
# precision, until the codes are all that the generator draws: with 0.001 or 0.01 here and as much
# weight on the codes as on the game, digits hardly change with z any more. With 0.1 a code is known
# to within 0.3 of its range of 2, at most 0.93 nats of information by the bound of ``code_losses``.
LEAST_CODE_VAR = 0.1


class Generator(nn.Module):
    """Latents [B, latent] to images in [-1, 1], [B, *data_shape].

    Args:
        data_shape: channels, height and width; sides of 5 pixels or more.
        latent: dimensions of z.
        width: channels of the hidden map nearest to the image; each further one has twice as many.
        classes: of the labels that an image is made for; 0: there are no labels.
        codes: continuous codes beside z; 0: there are none.

    Raises:
        ValueError: a number or a shape out of its range; inputs that are missing, or given where
            the model has none of them, or of another shape or dtype.
        RuntimeError: a label out of its range (on a device other than the CPU an assertion there).

    Example::

        >>> import torch
        >>> from sqloss.models.gan import Generator
        >>> model = Generator((3, 23, 28), latent=8, width=4, classes=10)
        >>> model(torch.randn(2, 8), torch.tensor([3, 9])).shape
        torch.Size([2, 3, 23, 28])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent: int = 100,
        width: int = 64,
        *,
        classes: int = 0,
        codes: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes("Generator", data_shape, latent, width, classes, codes)
        self.latent, self.classes, self.codes = latent, classes, codes
        (*larger, last) = _halvings(*data_shape[1:])
        depth = width * 2 ** (len(larger) - 1)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(latent + classes + codes, depth, last, bias=False)
        )
        for number, sides in reversed(list(enumerate(larger))):
            self.layers.extend([nn.BatchNorm2d(depth), nn.ReLU(inplace=True)])
            shallower = width * 2 ** (number - 1) if number else data_shape[0]
            self.layers.append(
                nn.ConvTranspose2d(
                    depth, shallower, _kernel(sides), stride=2, padding=1, bias=number == 0
                )
            )
            depth = shallower
        self.layers.append(nn.Tanh())

    def forward(
        self, z: Tensor, labels: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """The images of latents z [B, latent], labels int64 [B] and codes [B, codes] in [-1, 1]."""
        _check_shape("Generator", "z", z, (len(z), self.latent))
        _check_labels("Generator", labels, len(z), self.classes)
        _check_codes(codes, len(z), self.codes)
        inputs = [z]
        if labels is not None:
            inputs.append(F.one_hot(labels, self.classes).to(z.dtype))
        if codes is not None:
            inputs.append(codes)
        images: Tensor = self.layers(torch.cat(inputs, 1)[:, :, None, None])
        return images


class Discriminator(nn.Module):
    """Images in [-1, 1], [B, *data_shape], to logits [B]: large where they seem real.

    With classes it is a projection discriminator (Miyato & Koyama, 2018): to the logit of the
    image, the inner product of its last map with an embedding of the label is added; here the
    embedding has a value for each place of the map, which is not summed over them before.

    With codes it has InfoGAN's Q (Chen et al., 2016) beside the logit, on the same last map.

    Args:
        data_shape: channels, height and width; sides of 5 pixels or more.
        width: channels of the hidden map nearest to the image; each further one has twice as many.
        classes: of the labels that come with the images; 0: there are no labels.
        codes: continuous codes to read from the image; 0: there are none.
        batch_norm: whether the hidden layers but the first have batch norm. A gradient penalty,
            which is of one image at a time, asks for none.

    Raises:
        ValueError: a number or a shape out of its range; inputs that are missing, or given where
            the model has none of them, or of another shape or dtype.
        RuntimeError: a label out of its range (on a device other than the CPU an assertion there).

    Example::

        >>> import torch
        >>> from sqloss.models.gan import Discriminator
        >>> model, images = Discriminator((1, 28, 28), width=4, codes=2), torch.zeros(5, 1, 28, 28)
        >>> model(images).shape
        torch.Size([5])
        >>> logits, loc, var = model.with_codes(images)
        >>> loc.shape, var.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        width: int = 64,
        *,
        classes: int = 0,
        codes: int = 0,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes("Discriminator", data_shape, 1, width, classes, codes)
        self.data_shape, self.classes, self.codes = tuple(data_shape), classes, codes
        (*larger, last) = _halvings(*data_shape[1:])
        self.body = nn.Sequential()
        depth = data_shape[0]
        for number, sides in enumerate(larger):
            deeper = width * 2**number
            normed = batch_norm and number > 0
            self.body.append(
                nn.Conv2d(depth, deeper, _kernel(sides), stride=2, padding=1, bias=not normed)
            )
            if normed:
                self.body.append(nn.BatchNorm2d(deeper))
            self.body.append(nn.LeakyReLU(LEAKY_SLOPE, inplace=True))
            depth = deeper
        # One logit for any image, and what each class adds to it.
        self.head = nn.Conv2d(depth, 1 + classes, last)
        self.code_head = nn.Conv2d(depth, 2 * codes, last) if codes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The logits [B] of images [B, *data_shape] with labels int64 [B]."""
        return self._logits(self._features(images, labels), labels)

    def with_codes(
        self, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The logits [B], and mean [B, codes] and variance [B, codes] of the codes given the image.

        The distribution is normal, and the variance at least ``LEAST_CODE_VAR``.
        """
        if self.code_head is None:
            raise ValueError("Discriminator: with_codes: expected a model with codes, got codes=0")
        features = self._features(images, labels)
        loc, free_var = self.code_head(features).flatten(1).chunk(2, dim=1)
        return self._logits(features, labels), loc, F.softplus(free_var) + LEAST_CODE_VAR

    def _features(self, images: Tensor, labels: Tensor | None) -> Tensor:
        _check_shape("Discriminator", "images", images, (len(images), *self.data_shape))
        _check_labels("Discriminator", labels, len(images), self.classes)
        features: Tensor = self.body(images)
        return features

    def _logits(self, features: Tensor, labels: Tensor | None) -> Tensor:
        maps: Tensor = self.head(features).flatten(1)
        if labels is None:
            return maps[:, 0]
        return maps[:, 0] + maps[:, 1:].gather(1, labels[:, None])[:, 0]


class GAN(nn.Module):
    """``generator`` and ``discriminator`` of one model, initialised by DCGAN's rule.

    Weights are drawn from N(0, 0.02), the scales of batch norm from N(1, 0.02), both from torch's
    generator; biases are 0. The arguments and errors are those of ``Generator`` and
    ``Discriminator``.

    Example::

        >>> import torch
        >>> from sqloss.models import GAN
        >>> model = GAN((1, 8, 8), latent=16, width=8)
        >>> images = model.generator(torch.randn(3, 16))
        >>> images.shape, model.discriminator(images).shape
        (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent: int = 100,
        width: int = 64,
        *,
        classes: int = 0,
        codes: int = 0,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.generator = Generator(data_shape, latent, width, classes=classes, codes=codes)
        self.discriminator = Discriminator(
            data_shape, width, classes=classes, codes=codes, batch_norm=batch_norm
        )
        self.apply(_initialise)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
        nn.init.normal_(module.weight, mean, WEIGHT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _halvings(height: int, width: int) -> list[tuple[int, int]]:
    """The sides of the image and of every map after it."""
    sides = [(height, width)]
    while max(sides[-1]) > LAST_SIDE or len(sides) <= LEAST_HALVINGS:
        height, width = (height + 1) // 2, (width + 1) // 2
        sides.append((height, width))
    return sides


def _kernel(sides: tuple[int, int]) -> tuple[int, int]:
    """Of the convolution that halves a map of these sides, and of its mirror image."""
    height, width = sides
    return 4 - height % 2, 4 - width % 2


def _check_sizes(
    module: str, data_shape: Sequence[int], latent: int, width: int, classes: int, codes: int
) -> None:
    if len(data_shape) != 3 or data_shape[0] < 1 or min(data_shape[1:]) <= LAST_SIDE:
        raise ValueError(
            f"{module}: data_shape: expected (channels, height, width) with sides of at least "
            f"{LAST_SIDE + 1} pixels, got {tuple(data_shape)}"
        )
    for argument, value, least in (
        ("latent", latent, 1),
        ("width", width, 1),
        ("classes", classes, 0),
        ("codes", codes, 0),
    ):
        if value < least:
            raise ValueError(f"{module}: {argument}: expected at least {least}, got {value}")


def _check_shape(module: str, argument: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{module}: {argument}: expected shape {shape}, got {tuple(tensor.shape)}")


def _check_codes(codes: Tensor | None, count: int, expected: int) -> None:
    if codes is None:
        if expected > 0:
            raise ValueError(
                f"Generator: codes: expected shape {(count, expected)}, as the model has "
                f"{expected} codes, got none"
            )
    elif expected == 0:
        raise ValueError("Generator: codes: expected none, as the model has no codes, got a tensor")
    else:
        _check_shape("Generator", "codes", codes, (count, expected))


def _check_labels(module: str, labels: Tensor | None, count: int, classes: int) -> None:
    if labels is None:
        if classes > 0:
            raise ValueError(
                f"{module}: labels: expected int64 of shape {(count,)}, as the model has {classes} "
                "classes, got none"
            )
    elif classes == 0:
        raise ValueError(
            f"{module}: labels: expected none, as the model has no classes, got a tensor"
        )
    elif labels.dtype != torch.int64 or labels.shape != (count,):
        raise ValueError(
            f"{module}: labels: expected int64 of shape {(count,)}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
