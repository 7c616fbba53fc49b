import torch

from sqloss.models.seeding import generator, initialisation


def draw(*purpose) -> list[float]:
    return torch.rand(3, generator=generator(*purpose)).tolist()


def test_a_purpose_always_has_the_same_stream():
    assert draw(0, "order", 1) == draw(0, "order", 1)


def test_every_purpose_and_seed_has_its_own_stream():
    streams = [draw(0, "order", 1), draw(0, "order", 2), draw(0, "noise"), draw(1, "order", 1)]
    assert len(set(map(tuple, streams))) == len(streams)


def test_initialisation_is_seeded_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    undisturbed = torch.rand(2)
    torch.manual_seed(5)
    layers = []
    for _ in range(2):
        with initialisation(0, "model"):
            layers.append(torch.nn.Linear(3, 3))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(torch.rand(2), undisturbed)
