"""What ``sqloss sweep``, ``evaluate`` and ``impute`` do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqloss.common.errors import UserError, require
from sqloss.common.files import as_csv, write_atomically
from sqloss.common.flags import as_flag, taken
from sqloss.common.ranks import say
from sqloss.common.streams import show
from sqloss.experiments.comparison import CompareConfig, plan_comparison
from sqloss.experiments.directory import alone_in
from sqloss.experiments.imputation import (
    COLUMNS,
    ImputeConfig,
    as_table,
    baseline_methods,
    first_test_images,
    make_masks,
    measure,
    vae_methods,
)
from sqloss.experiments.imputation_plots import draw_imputations
from sqloss.experiments.sweep import Sweep, SweepConfig
from sqloss.experiments.sweep import plan as plan_sweep
from sqloss.experiments.sweep import prepare as prepare_sweep
from sqloss.experiments.sweep import train as train_sweep
from sqloss.experiments.sweep_report import (
    metric_to_choose_by,
    outcome,
    refuse_other_tails,
    summary,
    write_csv,
    write_report,
)
from sqloss.training.command import INTERRUPTED
from sqloss.training.saved_run import SavedRun, load_saved_run
from sqloss.training.shares import classifier_of
from sqloss.training.threads import set_threads
from sqloss.training.trainers import VAE
from sqloss.training.vae.bounds import BoundsConfig, bounds_table, measure_bounds, write_bounds
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.priors import PriorConfig, prior_of


def sweep(trainer: str, output_dir: Path | None = None, **given: Any) -> int:
    """Train with several settings and seeds, a run for each, and compare what they come to."""
    sweep_config, given = taken(SweepConfig, given)
    metric = metric_to_choose_by(sweep_config.measurement(trainer), sweep_config.best_by)
    whole = plan_sweep(trainer, sweep_config, output_dir, given)
    refuse_other_tails(whole, metric)
    return carry_out(whole, metric, sweep_config.jobs)


def carry_out(whole: Sweep, metric: str, jobs: int) -> int:
    """Do the runs of a sweep that are not done yet, and tell what all have come to."""
    with alone_in(whole.directory):
        missing = whole.missing
        say(f"sweep: {whole.directory}, {len(missing)} of {len(whole.tasks)} runs to do")
        try:
            prepare_sweep(whole, say)
            for number, task in enumerate(train_sweep(whole, jobs), 1):
                write_csv(whole)
                say(f"{number}/{len(missing)}: {outcome(whole, task, metric)}")
        except KeyboardInterrupt:
            say("\nstopped; what is done is kept: the same command does the rest")
            return INTERRUPTED
        write_csv(whole)  # also where nothing was to do, and the file has gone
        write_report(whole, metric)
    show(summary(whole, metric))
    say(f"with every metric: {whole.markdown}; every number: {whole.csv.name} beside it")
    return 0


def impute(run_dir: Path | None = None, compare: bool = False, **given: Any) -> int:
    """Fill in missing pixels with the VAEs of a run, or compare priors at it (--compare)."""
    if (run_dir is None) != compare:
        got = "neither" if run_dir is None else "both"
        raise UserError(f"RUN_DIR: expected the directory of a run, or --compare, got {got}")
    for needed in ("matplotlib.figure", "scipy.stats", "sklearn", "torchmetrics"):
        require(needed)
    impute_config, given = taken(ImputeConfig, given)
    if run_dir is None:
        output_dir = given.pop("output_dir", None)
        compare_config, given = taken(CompareConfig, given)
        whole = plan_comparison(compare_config, impute_config, output_dir, given)
        metric = metric_to_choose_by(whole.measurement, "")
        return carry_out(whole, metric, compare_config.jobs)
    refuse_all_but(VAEConfig.of_machine, given, "with RUN_DIR, whose models are trained already")
    return impute_with(load_saved_run(VAE, run_dir, given), impute_config, run_dir)


def impute_with(trained: SavedRun, impute_config: ImputeConfig, directory: Path) -> int:
    """Measure and draw how the VAEs of a run, and the baselines, impute its test images."""
    config, models = trained.config, trained.models
    data = first_test_images(trained.data, impute_config.test_images)
    set_threads(config, data)
    say(f"imputing {len(data.test_images)} test images with the models of {trained.done}")
    classifier = classifier_of(trained.whole, config.torch_device, config.seed)
    masks = make_masks(data.test_images, impute_config, config.seed)
    methods = vae_methods(models, data.train_images, impute_config, config.seed)
    methods |= baseline_methods(data.train_images, impute_config, config.seed)
    rows, imputed = measure(methods, data.test_images, data.test_labels, masks, classifier)
    write_atomically(directory / "impute.csv", as_csv(COLUMNS, rows))
    draw_imputations(directory, models, imputed, masks, data, config.seed)
    show(as_table(rows))
    say(
        "RMSE and MAE are over the missing pixels, SSIM is of whole images; accuracy is the share "
        "of images whose class a small classifier gets right"
    )
    say(
        f"the classifier gets {rows[0]['accuracy_of_originals']:.1%} of the originals right; "
        f"the rows are in {directory / 'impute.csv'}, the pictures beside it"
    )
    return 0


def evaluate(run_dir: Path, **given: Any) -> int:
    """Measure the VAEs of a run by their -ELBO and importance-weighted bound on test images."""
    require("scipy.stats")
    bounds_config, given = taken(BoundsConfig, given)
    prior_config, given = taken(PriorConfig, given)
    trained = load_saved_run(VAE, run_dir, given)
    set_threads(trained.config, trained.data)
    fitted = {name: prior_of(trained, run_dir, name, prior_config) for name in trained.models}
    priors = {n: f.mixture.with_power(prior_config.power) for n, f in fitted.items() if f}
    bounds = measure_bounds(trained, bounds_config, priors, prior_config.in_words)
    write_bounds(run_dir, bounds)
    show(bounds_table(bounds))
    say(
        "both bounds are of the same draws for each image; error and interval cover the choice of "
        "test images, not the seed of the training"
    )
    say(f"with more digits: {run_dir / 'evaluation.json'}")
    return 0


def refuse_all_but(allowed: Sequence[str], given: Mapping[str, Any], where: str) -> None:
    for name in given:
        if name not in allowed:
            flags = ", ".join(map(as_flag, allowed))
            raise UserError(f"{as_flag(name)}: expected no such flag {where}, but {flags}")
