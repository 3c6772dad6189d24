"""What `farnear mine` has its ranks do: open the shards and the model as a training would, and mine.

The model runs under the run's strategy where that spreads its weights, for it may not fit one GPU; else each rank has a
copy. With ZeRO-1 and 2 the weights are whole on every rank anyway, so they are mined with as under ddp.
"""

from functools import partial
from pathlib import Path

from farnear.config import RunConfig
from farnear.mining_section import strategy_of_mining
from farnear.parallel.world import on_main_rank
from farnear.retrieve.mine import Mined
from farnear.run_folder import files_left
from farnear.sections import LossConfig
from farnear.signals import Signals
from farnear.training.beside import mine_judged
from farnear.training.beside_runs import Work, no_longer_done, note_done, work_in
from farnear.training.embedders import EmbedderKind, embedder_facts
from farnear.training.engine import build_model
from farnear.training.opening import prepare_workers
from farnear.training.shards import kinds_held, open_data, refuse_unsupported
from farnear.wording import counted


def mining_config(config: RunConfig) -> RunConfig:
    """The run file as its model is mined with: under a strategy that holds no more than it must."""
    training = config.training.model_copy(update={"reduce": "step", "gradient_checkpointing": False})
    data = config.data.model_copy(update={"negatives": (), "eval": (), "eval_corpus": ()})
    changed = {"strategy": strategy_of_mining(config.strategy), "training": training, "data": data}
    return config.model_copy(update={**changed, "loss": LossConfig()})


def mine_on_ranks(config: RunConfig, folder: Path, inputs: str, signals: Signals | None = None) -> None:
    """Mine into a folder on the ranks that the launcher started.

    Args:
        config: As `mining_config` gives it.
        inputs: What a launch knows the same mining by; noted in the folder when it is done.

    Raises:
        UserError: Naming what is wrong with shards or model.
        RunInterruptedError: On every rank, after a signal.
    """
    with work_in(config, folder, signals) as work:
        mined = _mine(config, work, folder)
        if work.world.is_main:
            note_done(folder, files_left(folder), inputs=inputs)
            print(summary(mined), flush=True)


def summary(mined: Mined) -> str:
    """What came of it, in two lines."""
    report = mined.report
    fewer = f"{counted(report['pairs_with_fewer'], 'pair')} with fewer than {report['num_negatives']}"
    if report["pairs_without"]:
        fewer += f", {report['pairs_without']:,} of them with none"
    if report["unusable"]:
        fewer += f"; {counted(len(report['unusable']), 'input')} left out that cannot be used: see report.json"
    return (
        f"mined {counted(report['negatives'], 'negative')} of {counted(report['pairs'], 'pair')}, {fewer}\n"
        f"set data.negatives: {mined.path}; look at {mined.path.parent / 'examples.html'}"
    )


def _mine(config: RunConfig, work: Work, folder: Path) -> Mined:
    world, between, watch = work.world, work.between, work.watch
    if config.data.dataloader_num_workers:
        prepare_workers()
    data = open_data(config.data, config.evaluation, world)
    between()
    watch.at("model")
    built = build_model(config, EmbedderKind(config), world)
    refuse_unsupported(built.model, config.model.title, kinds_held(data))
    facts = embedder_facts(config, built, world)
    work.terminal.begin()
    on_main_rank(world, partial(no_longer_done, folder))
    by = built.inference(config, world, between=between, told=watch.counts("mining"))
    return mine_judged(config, data, by, folder, facts)
