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
    # The first batch is as full as any; slices of other ranks differ from rank 0's by one pair at most.
    batch = int((plan.rows_SG[0] >= 0).sum())
    pairs_per_rank = len(slice_of_rank(plan.rows_SG[0], 0, world.world_size))
    mini_batches = -(-pairs_per_rank // training.mini_batch_size)
    pooling = next((str(module.pooling_mode) for module in model if isinstance(module, Pooling)), "its own")
    parameters = sum(shape.numel() for shape in (getattr(p, "ds_shape", p.shape) for p in model.parameters()))
    precision = "bf16 weights" if training.pure_bf16 else f"fp32 weights, {'bf16' if training.bf16 else 'fp32'} compute"
    prompts = ", ".join(f"{name}: {text!r}" for name, text in model.prompts.items() if text) or "none"
    hard = len(data.train.negatives) if config.data.num_negatives != 0 else 0
    all_there_are = f" (all there are, training.global_batch_size is {training.global_batch_size})"
    lines = [
        ("model", f"{config.model.name_or_path}: {parameters:,} parameters, {precision}"),
        ("reads", f"{', '.join(map(str, model.modalities))}; pooling {pooling}; prompts {prompts}"),
        (
            "trains",
            f"on {_count(world.world_size, 'rank')} ({world.device.type}), "
            f"strategy {config.strategy}, seed {config.seed}",
        ),
        (
            "pairs",
            f"{len(data.train):,} in {_count(len(data.train.shards), 'shard')}, "
            f"{_count(hard, 'hard negative')}, {_count(data.train.ignored_members, 'member')} ignored",
        ),
        (
            "batch",
            f"{batch} pairs{all_there_are if batch < training.global_batch_size else ''}, {pairs_per_rank} a rank in "
            f"{_count(mini_batches, 'mini-batch', 'mini-batches')} of up to {training.mini_batch_size}; "
            f"negatives a query: {batch - 1}{' and the hard ones' if hard else ''}",
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
        ("saves", _saves(parts)),
        ("evaluates", _evaluation(parts, data)),
    ]
    return "\n".join(f"{name:>10}  {text}" for name, text in lines)


def _saves(parts: Parts) -> str:
    when = f"every {_count(parts.save_steps, 'step')} and at the end" if parts.save_steps else "at the end"
    return f"{when}; the best of the evaluations is kept too" if parts.eval_steps else when


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _evaluation(parts: Parts, data: RunData) -> str:
    if data.whole is None or data.sample is None:
        return "nothing: data.eval names no shards"
    when = f"every {_count(parts.eval_steps, 'step')}" if parts.eval_steps else "not in between"
    return f"{len(data.whole.relevant)} queries on {data.whole.pages} pages at start and end; {when}" + (
        f", on {len(data.sample.relevant)} queries and {data.sample.pages} pages" if parts.eval_steps else ""
    )
