"""What follows from the run file, the data and the machine, said before step 0."""

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from farnear.data.plan import slice_of_rank
from farnear.training.loop import Parts
from farnear.training.optim import warmup_steps
from farnear.training.shards import RunData


def derived_numbers(parts: Parts, data: RunData, model: SentenceTransformer) -> str:
    """The numbers as lines of text."""
    config, training, world = parts.config, parts.config.training, parts.world
    plan = parts.loader.plan(0)
    # The first batch is a full one; slices of other ranks differ from rank 0's by one pair at most.
    pairs_per_rank = len(slice_of_rank(plan.rows_SG[0], 0, world.world_size))
    mini_batches = -(-pairs_per_rank // training.mini_batch_size)
    pooling = next((str(module.pooling_mode) for module in model if isinstance(module, Pooling)), "its own")
    parameters = sum(shape.numel() for shape in (getattr(p, "ds_shape", p.shape) for p in model.parameters()))
    precision = "bf16 weights" if training.pure_bf16 else f"fp32 weights, {'bf16' if training.bf16 else 'fp32'} compute"
    prompts = ", ".join(f"{name}: {text!r}" for name, text in model.prompts.items() if text) or "none"
    negatives = f"{len(data.train.negatives)} hard negatives, " if len(data.train.negatives) else ""
    lines = [
        ("model", f"{config.model.name_or_path}: {parameters:,} parameters, {precision}"),
        ("reads", f"{', '.join(map(str, model.modalities))}; pooling {pooling}; prompts {prompts}"),
        (
            "trains",
            f"on {world.world_size} {'rank' if world.world_size == 1 else 'ranks'} ({world.device.type}), "
            f"strategy {config.strategy}, seed {config.seed}",
        ),
        (
            "pairs",
            f"{len(data.train):,} in {len(data.train.shards)} shards, {negatives}"
            f"{data.train.ignored_members} members ignored",
        ),
        (
            "batch",
            f"{training.global_batch_size} pairs, {pairs_per_rank} a rank in {mini_batches} mini-batches of up to "
            f"{training.mini_batch_size}; negatives a query: {plan.rows_SG.shape[1] - 1} and the hard ones",
        ),
        (
            "duplicates",
            f"first epoch: {plan.moved} pairs moved to another batch, {plan.masked} masked where they could not be",
        ),
        (
            "steps",
            f"{parts.total_steps} in all, {parts.loader.steps_per_epoch} an epoch "
            f"({parts.total_steps / parts.loader.steps_per_epoch:.2f} epochs), "
            f"{warmup_steps(training, parts.total_steps)} of warm-up, then {training.lr_scheduler_type}",
        ),
        ("saves", f"every {parts.save_steps} steps" if parts.save_steps else "at the end"),
        ("evaluates", _evaluation(parts, data)),
    ]
    return "\n".join(f"{name:>10}  {text}" for name, text in lines)


def _evaluation(parts: Parts, data: RunData) -> str:
    if data.whole is None or data.sample is None:
        return "nothing: data.eval names no shards"
    when = f"every {parts.eval_steps} steps" if parts.eval_steps else "not in between"
    return f"{len(data.whole.relevant)} queries on {data.whole.pages} pages at start and end; {when}" + (
        f", on {len(data.sample.relevant)} queries and {data.sample.pages} pages" if parts.eval_steps else ""
    )
