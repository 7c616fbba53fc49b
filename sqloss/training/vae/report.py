"""What a run has come to: how well each class is modelled, and how often it is generated."""

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sqloss.common.flags import flat
from sqloss.common.tables import CONFIDENCE, nats, table
from sqloss.common.text import in_markdown
from sqloss.datasets import Dataset
from sqloss.models import VAE
from sqloss.models.classifier import accuracy
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
from sqloss.training import sampling_report
from sqloss.training.attributes import AttributeJudge, attribute_note, attribute_table
from sqloss.training.config import STANDARD
from sqloss.training.progress import counted
from sqloss.training.risks import CVaR
from sqloss.training.shares import batch_sizes, class_shares, classifier_of, share_table
from sqloss.training.vae.bounds import estimate
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import learnt_df, objective_values, summary

PER_CLASS = {"reconstruction": "recon.", "negative_elbo": "-ELBO", "negative_elbo_cvar": "CVaR"}

Report = dict[str, Any]
Losses = Mapping[str, Tensor]  # one value per test image, by the name of the loss


def make_report(
    models: Mapping[str, VAE],
    losses: Mapping[str, Losses],
    whole: Dataset,
    data: Dataset,
    config: VAEConfig,
    under_priors: Mapping[str, Losses] = MappingProxyType({}),
    of_reference: Losses | None = None,
) -> Report:
    """The report on models with these test losses, trained on ``data``.

    ``whole`` is the data before the imbalance: from it the classifier learns every class.
    ``under_priors`` are the test losses under a prior of communities, where there are such, and
    ``of_reference`` those of the run's reference.
    """
    device = data.train_images.device
    classifier = classifier_of(whole, device, config.seed)
    report: Report = {
        "config": flat(config),
        "risk": {"flags": config.risk.flags, "tail_alpha": config.risk.tail_alpha},
        "alpha_of_cvar": config.metric_alpha,
        "objectives": config.objective_names,
        "class_names": list(data.class_names),
        "train_images": data.class_counts(),
        "train_images_before_imbalance": whole.class_counts(),
        "classifier_test_accuracy": accuracy(classifier, data.test_images, data.test_labels),
        "models": {
            name: {
                "test": overall(losses[name], config.metric_alpha)
                | objective_values(losses[name], config, of_reference),
                "test_by_class": by_class(losses[name], data, config.metric_alpha),
                "generated": class_shares(classifier, generated(model, config)),
            }
            | learnt_df(model)
            for name, model in models.items()
        },
    }
    for name, under_prior in under_priors.items():
        gained = under_prior["negative_elbo"] - losses[name]["negative_elbo"]
        report["models"][name]["communities_prior"] = overall(under_prior, config.metric_alpha) | {
            "change": estimate(gained)
        }
    if whole.train_attributes:
        judge = AttributeJudge.learn(whole, config.imbalance, device, config.seed)
        report["attributes"] = judge.describe(whole, data)
        for name, model in models.items():
            measured = report["models"][name]
            measured["attributes"] = judge.shares(generated(model, config))
            measured["test_by_attribute"] = by_attribute(losses[name], judge, data, config)
    return report


def by_attribute(
    losses: Losses, judge: AttributeJudge, data: Dataset, config: VAEConfig
) -> list[dict[str, Any] | None]:
    """The summary over the test images of each part of the judge; None where it has none."""
    return [
        {"images": int(has.sum())}
        | summary({name: values[has] for name, values in losses.items()}, config.metric_alpha)
        if has.any()
        else None
        for has in judge.members(data.test_attributes)
    ]


def overall(losses: Losses, alpha: float) -> dict[str, Any]:
    """The summary over all test images, with a standard error over them."""
    bound = losses["negative_elbo"]
    error = (bound.std() / len(bound) ** 0.5).item() if len(bound) > 1 else None
    return {"images": len(bound), "negative_elbo_standard_error": error} | summary(losses, alpha)


def by_class(losses: Losses, data: Dataset, alpha: float) -> list[dict[str, Any]]:
    """The summary over the test images of each class that has any."""
    labels = data.test_labels.cpu()
    return [
        {"class": data.class_names[label], "images": int((labels == label).sum())}
        | summary({name: values[labels == label] for name, values in losses.items()}, alpha)
        for label in labels.unique().tolist()
    ]


def worst_class(classes: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The class, of those of ``by_class``, in which a metric is worst."""
    return max(classes, key=itemgetter(metric))


def generated(model: VAE, config: VAEConfig) -> Iterator[Tensor]:
    """Images of a model in batches; every model gets the same noise."""
    draws = generator(config.seed, "samples")
    for count in batch_sizes(config.num_samples):
        yield model.sample(count, draw_seed(generator=draws))


def as_markdown(report: Report) -> str:
    config = report["config"]
    alpha = f"{report['alpha_of_cvar']:g}"
    risk = report["risk"]
    metric_note = "" if risk["tail_alpha"] else f" (the usual one, as {risk['flags']} has no tail)"
    samples = config["iwae_samples"]
    bound_note = (
        f"\n- The IW-{samples} bound is the importance-weighted one on log p(x) of Burda et al. "
        f"(2016),\n  of {counted(samples, 'draw')} per image."
        if samples
        else ""
    )
    kl_note = (
        "\n  So is the KL of Student's t, which has no closed form: log q - log p at that draw."
        "\n  Where it is small, its mean over few images may come out below 0, and the -ELBO below"
        "\n  the reconstruction."
        if config["prior"] == "t"
        else ""
    )
    return f"""\
# VAE on {config["dataset"]}

{how_trained(report)}
{latent_variables(config)}
Every setting is in `config.json`.

{tables(report)}

## How to read this

- Losses are in nats per image, on test images that keep every class. -ELBO = reconstruction + KL,
  with weight 1 whatever --beta is. CVaR is the mean of the worst {1 - report["alpha_of_cvar"]:.4g}
  share of the -ELBO, at alpha = {alpha}{metric_note}.
{curves_note(report)}{bound_note}
- Each image's -ELBO is of one draw from the posterior. The mean over the images is unbiased, but
  images with an unlucky draw come to lie in the tail: that biases the CVaR slightly
  upwards.{kl_note}{moments_note(report)}{prior_note(report)}
- This is one run with one seed. A difference between the models on one seed is not evidence for
  one of them: repeat it with several seeds. The standard error of the mean -ELBO covers the choice
  of test images only, not the seed.
- Generated images are counted by a small classifier that was trained on the training images
  before the imbalance, and gets {report["classifier_test_accuracy"]:.1%} of the test images right.
  The intervals are Wilson's at {CONFIDENCE:.0%}; they cover the number of generated images, not
  the classifier's errors.{attribute_note(report)}
{sampling_report.note(report)}
![Losses over the epochs](vae_loss_curves.png)
![Distribution of the test losses](vae_loss_distribution.png)
![Generated images](vae_samples.png)
![Reconstructions](vae_reconstructions.png)
"""


def curves_note(report: Report) -> str:
    """What the curves show, which an objective that needs more than losses is not."""
    mean, own = report["objectives"].values()
    if own in dict(objectives_measured(report)):
        return (
            "- The curves show the objectives, on the test images, and every model by both of "
            f"them: the\n  {mean}, and the {own}."
        )
    return (
        f"- The curves show the {mean}, on the test images. The {own}\n"
        "  is one of training images, whose groups are known."
    )


def how_trained(report: Report) -> str:
    """What each model was trained on, in words that hold for every --tail-term and --beta."""
    config = report["config"]
    risk = report["risk"]["flags"]
    reference = f", --reference {config['reference']}" if config["reference"] else ""
    flags = f"({risk}, --tail-term {config['tail_term']}, --beta {config['beta']:g}{reference})"
    minimised = ", ".join(
        f"`{m}` minimises the {report['objectives'][m]}" for m in report["models"]
    )
    alike = ", from the same initial weights, on the same batches and noise"
    return (
        f"On each batch, {minimised}\n{flags},\n"
        f"for {counted(config['epochs'], 'epoch')}{alike if len(report['models']) > 1 else ''}."
    )


def latent_variables(config: Mapping[str, Any]) -> str:
    """Their distribution, in words."""
    if config["prior"] == "normal":
        family = "normal"
    elif config["learn_df"]:
        family = f"Student's t, with a df that is learnt from {config['df']:g} on"
    else:
        family = f"Student's t with df = {config['df']:g}"
    return f"Prior and posterior of the latent variables are {family}."


def moments_note(report: Report) -> str:
    """What Student's t with a small df does to means of losses that grow with z."""
    config = report["config"]
    df = min(model.get("df", config["df"]) for model in report["models"].values())
    if config["prior"] != "t" or df > 2:
        return ""
    moment = "mean" if df <= 1 else "variance"
    return (
        f"\n- At df = {df:.3g} the latent variables have no finite {moment}. The decoder is linear"
        "\n  far out, so nor has the -ELBO: a few far draws make its mean and its standard error."
    )


def prior_note(report: Report) -> str:
    """What the prior of communities is, where there is one."""
    priors = {name: m.get("communities_prior") for name, m in report["models"].items()}
    if not all(priors.values()):
        return ""
    changes = "; ".join(
        f"{name} {prior['change']['mean']:+.2f}"
        + (
            f" [{prior['change']['low']:+.2f}, {prior['change']['high']:+.2f}]"
            if prior["change"]["low"] is not None
            else ""
        )
        for name, prior in priors.items()
        if prior
    )
    return (
        "\n- The prior of communities is a mixture fitted to the latents of the training images"
        "\n  after the training, with a component for each community of their neighbour graph"
        "\n  (`sqloss sample --prior communities`). It weighs rare images as the data do: where the"
        "\n  -ELBO falls it is simply a better prior of the same model. The KL to it is of the same"
        f"\n  draw as the reconstruction. Change of the mean -ELBO in nats: {changes}."
    )


def tables(report: Report) -> str:
    """The numbers of a report, as Markdown that a terminal shows well too."""
    parts = [overall_table(report), class_table(report), share_table(report)]
    if "attributes" in report:
        parts += [attribute_loss_table(report), attribute_table(report)]
    return "\n\n".join(map(table, parts))


def overall_table(report: Report) -> Iterator[list[str]]:
    models = report["models"].values()
    cvar = f"CVaR {report['alpha_of_cvar']:g} of -ELBO"
    images = next(iter(models))["test"]["images"]
    yield [f"{images} test images", *report["models"]]
    for label, metric in (
        ("mean -ELBO", "negative_elbo"),
        ("its standard error", "negative_elbo_standard_error"),
        (cvar, "negative_elbo_cvar"),
        ("mean reconstruction", "reconstruction"),
        ("mean KL", "kl"),
        *objectives_of_their_own(report),
    ):
        yield [label, *(nats(model["test"][metric]) for model in models)]
    priors = [model.get("communities_prior") for model in models]
    if all(priors):
        yield [
            "mean -ELBO, prior of communities",
            *(nats(prior["negative_elbo"]) for prior in priors if prior),
        ]
    if report["config"]["learn_df"]:
        yield ["learnt df", *(f"{model['df']:.3g}" for model in models)]
    for label, metric in (
        ("mean -ELBO", "negative_elbo"),
        (cvar, "negative_elbo_cvar"),
        ("mean reconstruction", "reconstruction"),
    ):
        worst = [worst_class(model["test_by_class"], metric) for model in models]
        cells = [f"{nats(w[metric])} ({in_markdown(w['class'])})" for w in worst]
        yield [f"worst class: {label}", *cells]


def objectives_of_their_own(report: Report) -> Iterator[tuple[str, str]]:
    """Label and metric of the objectives that are not the mean or the CVaR of the -ELBO anyway."""
    for words, metric in objectives_measured(report):
        is_usual = metric in (f"objective_{name}" for name in (STANDARD, CVaR.name))
        if not is_usual or not words.endswith("of -ELBO"):
            yield words, metric


def objectives_measured(report: Report) -> Iterator[tuple[str, str]]:
    """Words and metric of the objectives that the models are measured by."""
    test = next(iter(report["models"].values()))["test"]
    for objective, words in report["objectives"].items():
        if f"objective_{objective}" in test:
            yield words, f"objective_{objective}"


def class_table(report: Report) -> Iterator[list[str]]:
    models = report["models"]
    yield ["class", "train", *(f"{label} {m}" for label in PER_CLASS.values() for m in models)]
    train_images = dict(zip(report["class_names"], report["train_images"], strict=True))
    for rows in zip(*(model["test_by_class"] for model in models.values()), strict=True):
        name = rows[0]["class"]
        numbers = [nats(row[metric]) for metric in PER_CLASS for row in rows]
        yield [in_markdown(name), str(train_images[name]), *numbers]


def attribute_loss_table(report: Report) -> Iterator[list[str]]:
    """The losses on the test images, of which no imbalance takes any, with each attribute."""
    models = report["models"]
    yield ["attribute", "test", *(f"{label} {m}" for label in PER_CLASS.values() for m in models)]
    rows = zip(*(model["test_by_attribute"] for model in models.values()), strict=True)
    for part, of_models in zip(report["attributes"]["parts"], rows, strict=True):
        if of_models[0] is not None:
            numbers = [nats(row[metric]) for metric in PER_CLASS for row in of_models]
            yield [in_markdown(part), str(of_models[0]["images"]), *numbers]
