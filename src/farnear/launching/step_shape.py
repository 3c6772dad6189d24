"""What a rank's step consists of: an embedder's of pages and queries, a reranker's of pages and pairs.

    embedder    "document" and "query", each in both passes; the embeddings of all ranks meet in the loss
    reranker    "document": distinct pages through the vision tower, in both passes; "pair": entries of lists through
                the language model, in pass two alone where every list fits into a mini-batch; image features stand
                between the two halves, and no score leaves its rank

All that differs between the two stands here; `farnear.launching.forecast` makes memory, network and time of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from farnear.config import RunConfig
from farnear.launching.memory import TILE_BYTES
from farnear.launching.passes import Side, estimated, mini_batch
from farnear.launching.run_data import RunData, Tokens
from farnear.model.blueprint import TOKENS_OF_TEMPLATE, EmbedderBlueprint
from farnear.model.blueprint_reranker import RerankerBlueprint
from farnear.model.hollow import CannotTraceError
from farnear.reranker_section import RerankerConfig


@dataclass(frozen=True)
class Lists:
    """A reranker's.

    Attributes:
        hard, in_batch: Negatives of a list: mined ones, the mean, and those of the batch.
        longest: Entries of the longest list.
        are_whole: Whether each fits into a mini-batch.
    """

    hard: float
    in_batch: int
    longest: int
    are_whole: bool


@dataclass(frozen=True)
class StepShape:
    """Of one rank, the one with most.

    Attributes:
        main: The side whose mini-batch decides what fits.
        page_tokens: Of the largest page, a template's included.
        sides: In the order in which a step comes to them.
        pairs, documents: Of the rank; a reranker's documents are distinct.
        pairs_of_all, documents_of_all: Of the global batch.
        together: Mini-batches in pass one.
        shown_bytes, said_bytes: What the rank shows to all, and what it says about all, beside the strategy.
        cast_bytes: Of the weights' copies in half precision that a pass holds.
        embedding_bytes, tile_bytes: Of the loss.
        feature_bytes: Of image features, their gradients included.
        lists: None for an embedder.
        estimated: Why the model could not be traced; empty if it was.
    """

    main: str
    page_tokens: int
    sides: Mapping[str, Side]
    pairs: int
    documents: int
    pairs_of_all: int
    documents_of_all: int
    together: int
    shown_bytes: int
    said_bytes: int
    cast_bytes: int
    embedding_bytes: int = 0
    tile_bytes: int = 0
    feature_bytes: int = 0
    lists: Lists | None = None
    estimated: str = ""

    def mini_batches_of(self, inputs: int | None) -> dict[str, int]:
        """Inputs of each side's mini-batches with so many of the main side; None for those of the run file."""
        sizes = {name: side.mini_batch for name, side in self.sides.items()}
        if inputs is None:
            return sizes
        if self.lists is None:
            # An embedder's sides take what fits alike.
            return {name: min(inputs, side.inputs) for name, side in self.sides.items()}
        # A reranker's pages go through their tower by themselves, and need not go together.
        return {name: inputs if name == self.main else min(inputs, size) for name, size in sizes.items()}

    def most_bytes(self, inputs: int | None = None) -> tuple[int, int]:
        """Most that lives in a forward without a graph, and in a forward with one and its backward.

        Args:
            inputs: As in `mini_batches_of`.
        """
        sizes = self.mini_batches_of(inputs)
        forward = [
            side.forward_bytes(sizes[name] * self.together) for name, side in self.sides.items() if side.in_pass_one
        ]
        backward = [side.backward_bytes(sizes[name]) for name, side in self.sides.items() if side.in_pass_two]
        return max(forward, default=0), max(backward, default=0)


def embedder_shape(config: RunConfig, model: EmbedderBlueprint, data: RunData, ranks: int) -> StepShape:
    """Of a gradient-cached contrastive step (`farnear.training.cache`)."""
    batch = _batch(config, data)
    pairs = -(-batch // ranks)
    documents, documents_of_all = (math.ceil(number * (1 + data.negatives)) for number in (pairs, batch))
    sides: dict[str, Side] = {}
    why = ""
    for side, inputs, tokens in (("document", documents, data.page), ("query", pairs, data.query)):
        visual = tokens.largest - TOKENS_OF_TEMPLATE if side == "document" else 0
        text = tokens.largest - visual
        size = mini_batch(config, side, inputs, tokens.largest)
        try:
            first = model.trace(size, text_tokens=text, visual_tokens=visual, together=size)
            # The larger side decides what fits, and only its second trace is worth its time.
            second = model.trace(2 * size, text_tokens=text, visual_tokens=visual) if side == "document" else None
        except CannotTraceError as error:
            why = str(error)
            first, second = estimated(model, model.units_of_side(side), size, tokens.largest), None
        share = 1.0 if side == "query" and model.pads_queries else tokens.mean / tokens.largest
        sides[side] = Side(inputs, size, tokens.largest, share, first, second)
    casts = [side.first.cast_bytes for side in sides.values()]
    directions = config.loss.directions
    of_queries = sum(name.endswith("_to_query") for name in directions)
    columns = of_queries * batch + (len(directions) - of_queries) * documents_of_all
    width = model.width
    # What is compared, gathered, its gradient, and both once more while they are sent.
    embeddings = documents_of_all + (batch if of_queries else 0)
    own = documents + (pairs if of_queries else 0)
    dims = len(config.loss.matryoshka_dims or (0,))
    rows = min(pairs, max(1, TILE_BYTES // (4 * columns * (dims + 2))))
    # Hashes, owners and masks of documents; of queries an answer too.
    facts = 8 * (3 * documents + 3 * pairs)
    return StepShape(
        main="document",
        page_tokens=data.page.largest,
        sides=sides,
        pairs=pairs,
        documents=documents,
        pairs_of_all=batch,
        documents_of_all=documents_of_all,
        together=1 if config.training.keep_graphs == 1.0 else config.training.no_grad_mini_batch_factor,
        shown_bytes=facts + 4 * width * own + 8 * 7,
        said_bytes=4 * ranks * (width * own + 6 + 3 * ranks),
        # Both sides are in a pass, each with its tower, or queries with a part of what pages have cast.
        cast_bytes=sum(casts) if model.has_tower_of_each_side else max(casts),
        embedding_bytes=4 * 4 * width * embeddings,
        tile_bytes=4 * rows * columns * (dims + 2),
        estimated=why,
    )


def reranker_shape(
    config: RunConfig, reranker: RerankerConfig, model: RerankerBlueprint, data: RunData, ranks: int
) -> StepShape:
    """Of a step over lists (`farnear.training.rerank_step`), as `farnear.data.list_dealing` cuts them."""
    batch = _batch(config, data)
    own = -(-batch // ranks)
    in_batch = min(reranker.num_negatives, batch - 1)
    longest = 1 + data.most_negatives + in_batch
    entries = math.ceil(own * (1 + data.negatives + in_batch))
    # Random ones follow on the ring, so that neighbours share them; the nearest may be anywhere in the batch.
    others = in_batch if reranker.sampling_strategy == "random" else own * in_batch
    pages = math.ceil(own * (1 + data.negatives)) + min(batch - own, others)
    tokens = Tokens(data.page.largest + data.query.largest, data.page.mean + data.query.mean)
    at_once, are_whole = _entries_at_once(config, own, entries, longest, tokens.largest)
    sides: dict[str, Side] = {}
    visual = max(1, data.page.largest - TOKENS_OF_TEMPLATE)
    tower_trains = False
    why = ""
    try:
        if not model.pages.is_known:
            raise CannotTraceError("its config does not say how a page becomes tokens")
        if model.sees_apart:
            size = mini_batch(config, "document", pages, data.page.largest)
            seen = model.trace_pages(size, visual_tokens=visual)
            tower_trains = seen.trains
            share = (data.page.mean - TOKENS_OF_TEMPLATE) / visual
            sides["document"] = Side(pages, size, data.page.largest, share, seen, None)
        first, second = (
            model.trace_pairs(
                number,
                text_tokens=tokens.largest - visual,
                visual_tokens=visual,
                of_features=model.sees_apart,
                tower_trains=tower_trains,
            )
            for number in (at_once, 2 * at_once)
        )
    except CannotTraceError as error:
        why = str(error)
        sides = {}
        first, second = estimated(model, model.units, at_once, tokens.largest), None
    sides["pair"] = Side(
        entries, at_once, tokens.largest, tokens.mean / tokens.largest, first, second, in_pass_one=not are_whole
    )
    features = 0
    if "document" in sides:
        features = 4 * model.feature_width * math.ceil(pages * (data.page.mean - TOKENS_OF_TEMPLATE))
    return StepShape(
        main="pair",
        page_tokens=data.page.largest,
        sides=sides,
        pairs=own,
        documents=pages,
        pairs_of_all=batch,
        documents_of_all=math.ceil(batch * (1 + data.negatives)),
        together=1,
        # How much each has, and what comes of it: the loss, and the seconds of each.
        shown_bytes=8 * 5,
        said_bytes=4 * (1 + ranks),
        # Each of the two halves forgets its own.
        cast_bytes=max(side.first.cast_bytes for side in sides.values()),
        feature_bytes=features * (2 if tower_trains else 1),
        lists=Lists(data.negatives, in_batch, longest, are_whole),
        estimated=why,
    )


def _entries_at_once(config: RunConfig, lists: int, entries: int, longest: int, tokens: int) -> tuple[int, bool]:
    """Entries of a mini-batch, and whether it holds whole lists."""
    training = config.training
    size, bound = training.mini_batch_size_of["pair"], training.mini_batch_num_tokens_of["pair"]
    assert bound != "auto"
    limits = [limit for limit in (size, None if bound is None else bound // tokens) if limit is not None]
    most = min(limits, default=lists * longest)
    if longest > most:
        return max(1, min(entries, most)), False
    return min(entries, most // longest * longest), True


def _batch(config: RunConfig, data: RunData) -> int:
    return min(config.training.global_batch_size, data.pairs or config.training.global_batch_size)
