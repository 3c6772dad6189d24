"""One rank's lists of a step: which they are, how they go through the model, and what the workers prepare for that.

An entry of a list, a query with one page, is what a reranker scores. Entries go through the language model in *turns*.
Where every list of the batch fits into a mini-batch, a turn holds whole lists, and its loss can be had, and run
backward, at once. Where one does not, turns hold entries in order of their cost, and the step needs a gradient cache.
All ranks do the one or the other: both follow from the lists of all.

What a worker prepares is a *job*. Where the vision tower can be run apart from the language model, a job is some pages
with all the entries that they stand in: a page is read, decoded and resized once a step, and goes through the tower
once, however many lists it is in, and the turns are put together from the jobs. Elsewhere a job is a turn.

All of it follows from the index, before anything is read. Entries of one *kind* (what query and page hold together,
"image" or "text" for instance) go through the same modules.

Shapes: G lists of the global batch, b of this rank, e their entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from farnear.data.batch import Quarantined, quarantined_pair
from farnear.data.budget import PageTokens, cut, input_cost
from farnear.data.index import Index, modality_name
from farnear.data.lists import Similarity, arc_of_rank, lists_of_step
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.ranges import ranges
from farnear.data.workers import Job, Result

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ListShare:
    """What a rank does in a step.

    Attributes:
        pairs_b: Pair rows of its lists.
        list_e: Position in ``pairs_b`` of each entry's list; the first entry of a list is its positive.
        document_e: Input rows.
        teacher_e: A teacher's scores, nan where there is none.
        in_batch_e: Whether the page is another pair's positive.
        borrowed: Whether the rank has no list of its own and only keeps step, with one of another rank.
        whole_lists: Whether turns hold whole lists.
        turns: The entries of each; none where it is there for other ranks' sake.
        jobs: What workers do, each with its entries; none where it is there for other ranks' sake.
        left_out: Hard negatives of all ranks' lists that were none.
    """

    pairs_b: Int64
    list_e: Int64
    document_e: Int64
    teacher_e: Float32
    in_batch_e: Bool
    borrowed: bool
    whole_lists: bool
    turns: tuple[Int64, ...]
    jobs: tuple[tuple[Job, Int64], ...]
    left_out: int


@dataclass(frozen=True, eq=False)
class PairFeatures:
    """What a worker has prepared: the features of some entries, all of one kind.

    Attributes:
        entries: Positions among the rank's entries; none where other ranks' forwards need this one's.
    """

    kind: str
    entries: Int64
    features: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ListBatch:
    """One rank's lists of ``step`` (an optimizer step, counted over all epochs); see `ListShare` for what is not here.

    Attributes:
        valid_e: False for an entry that must not count; with its positive a list goes.
        job_e, place_e: Where an entry's features are: the job, and the pair in it.
    """

    step: int
    epoch: int
    pairs_b: Int64
    list_e: Int64
    valid_e: Bool
    teacher_e: Float32
    job_e: Int64
    place_e: Int64
    jobs: tuple[PairFeatures, ...]
    turns: tuple[Int64, ...]
    whole_lists: bool
    left_out: int
    quarantined: tuple[Quarantined, ...]
    seconds_waited: float


@dataclass(frozen=True)
class ListDealing:
    """How the lists of global batches are dealt to ranks and cut into jobs and turns.

    Attributes:
        page_tokens: What a page costs, by its size.
        mini_batch_size: Most pages ("document") of a job and entries ("pair") of a turn; None for no bound.
        mini_batch_num_tokens: Most that they may cost, padding included; None for no bound.
        num_hard, num_in_batch, similarity: As in `lists_of_step`.
        shares_images: Whether a job is some pages with all their entries.
        same_modalities: Whether a rank borrows an entry of every kind that another rank has, where a forward needs all
            ranks.
    """

    rank: int
    world_size: int
    page_tokens: PageTokens
    mini_batch_size: Mapping[str, int | None]
    mini_batch_num_tokens: Mapping[str, int | None]
    negatives: Negatives
    num_hard: int | None
    num_in_batch: int
    similarity: Similarity | None = None
    shares_images: bool = True
    same_modalities: bool = False

    def slice_of(self, order: Order, step: int) -> ListShare:
        """The rank's part of a step, counted over all epochs."""
        index = order.index
        lists = lists_of_step(
            order,
            step,
            self.negatives,
            num_hard=self.num_hard,
            num_in_batch=self.num_in_batch,
            similarity=self.similarity,
        )
        size_G = np.diff(lists.start_G1)
        query_E = index.query_N[np.repeat(lists.pair_G, size_G)]
        cost_E = input_cost(index, query_E, self.page_tokens) + input_cost(index, lists.document_E, self.page_tokens)
        kind_E = index.input_modality_I[query_E] | index.input_modality_I[lists.document_E]
        own = arc_of_rank(np.add.reduceat(cost_E, lists.start_G1[:-1]), self.rank, self.world_size)
        borrowed = len(own) == 0
        if borrowed:
            # A rank without lists would call fewer collectives than the others and hang them.
            own = np.zeros(1, np.int64)
        entries = ranges(lists.start_G1[own], size_G[own])
        list_e = np.repeat(np.arange(len(own)), size_G[own])
        longest = int(size_G.max())
        largest_G = np.maximum.reduceat(cost_E, lists.start_G1[:-1])
        whole_lists = self._fits(longest, longest * int(largest_G.max()))
        document_e, query_e, kind_e = lists.document_E[entries], query_E[entries], kind_E[entries]
        if self.shares_images:
            jobs = list(self._jobs_of_pages(index, query_e, document_e, kind_e))
        else:
            jobs = []
            for kind, group in self._groups(kind_e, list_e, whole_lists):
                for turn in self._turns(cost_E[entries[group]], list_e[group], longest, whole_lists):
                    jobs.append((pair_job(kind, query_e[group[turn]], document_e[group[turn]]), group[turn]))
        if self.same_modalities:
            for kind in np.setdiff1d(kind_E, kind_e):
                place = int(np.flatnonzero(kind_E == kind)[0])
                job = pair_job(modality_name(int(kind)), query_E[[place]], lists.document_E[[place]])
                jobs.append((job, entries[:0]))
        jobs.sort(key=lambda job: job[0].modality)
        turns = [own_e for _, own_e in jobs]
        if self.shares_images:
            turns = list(self._turns(cost_E[entries], list_e, longest, whole_lists))
        return ListShare(
            pairs_b=lists.pair_G[own],
            list_e=list_e,
            document_e=document_e,
            teacher_e=lists.teacher_E[entries],
            in_batch_e=lists.in_batch_E[entries],
            borrowed=borrowed,
            whole_lists=whole_lists,
            turns=tuple(turns),
            jobs=tuple(jobs),
            left_out=lists.left_out,
        )

    def batch(self, order: Order, step: int, share: ListShare, done: Sequence[Result], waited: float) -> ListBatch:
        """The rank's batch of a step, from the result of each job; ``waited`` are seconds."""
        index = order.index
        valid_e = np.full(len(share.list_e), not share.borrowed)
        job_e, place_e = np.zeros((2, len(valid_e)), np.int64)
        quarantined: dict[Quarantined, None] = {}
        for number, ((job, entries), (_, bad)) in enumerate(zip(share.jobs, done, strict=True)):
            job_e[entries], place_e[entries] = number, np.arange(len(entries))
            # What a rank borrowed, its owner reports.
            for place, reason in bad if len(entries) and not share.borrowed else ():
                assert job.pair_n2 is not None
                is_query = bool((job.pair_n2[:, 0] == place).any())
                touched = entries[(job.pair_n2 == place).any(axis=1)]
                valid_e[touched] = False
                # Another pair's page is reported by the rank that has that pair.
                own = touched if is_query else touched[~share.in_batch_e[touched]]
                for pair in np.unique(share.pairs_b[share.list_e[own]]).tolist():
                    quarantined[quarantined_pair(index, pair, int(job.rows[place]), reason)] = None
        return ListBatch(
            step=step,
            epoch=order.schedule.epoch_of(step),
            pairs_b=share.pairs_b,
            list_e=share.list_e,
            valid_e=valid_e,
            teacher_e=share.teacher_e,
            job_e=job_e,
            place_e=place_e,
            jobs=tuple(
                PairFeatures(job.modality, entries, features)
                for (job, entries), (features, _) in zip(share.jobs, done, strict=True)
            ),
            turns=share.turns,
            whole_lists=share.whole_lists,
            left_out=share.left_out,
            quarantined=tuple(quarantined),
            seconds_waited=waited,
        )

    def _fits(self, size: int, cost: int) -> bool:
        most, most_cost = self.mini_batch_size["pair"], self.mini_batch_num_tokens["pair"]
        return (most is None or size <= most) and (most_cost is None or cost <= most_cost)

    def _groups(self, kind_e: UInt8, list_e: Int64, whole_lists: bool) -> Iterator[tuple[str, Int64]]:
        """Entries, or whole lists of them, that go through the same modules: the kind, and which they are."""
        if whole_lists:
            kind_b = np.bitwise_or.reduceat(kind_e, np.flatnonzero(np.diff(list_e, prepend=-1)))
            kind_e = kind_b[list_e]
        for kind in np.unique(kind_e):
            yield modality_name(int(kind)), np.flatnonzero(kind_e == kind)

    def _turns(self, cost_e: Int64, list_e: Int64, longest: int, whole_lists: bool) -> Iterator[Int64]:
        most, most_cost = self.mini_batch_size["pair"], self.mini_batch_num_tokens["pair"]
        if not whole_lists:
            yield from cut(cost_e, most, most_cost)
            return
        starts = np.flatnonzero(np.diff(list_e, prepend=-1))
        sizes = np.diff(np.append(starts, len(list_e)))
        # As if all were as long as the longest: then what a part is said to cost is never below what it does.
        cost_b = longest * np.maximum.reduceat(cost_e, starts)
        for part in cut(cost_b, None if most is None else most // longest, most_cost):
            yield ranges(starts[part], sizes[part])

    def _jobs_of_pages(
        self, index: Index, query_e: Int64, document_e: Int64, kind_e: UInt8
    ) -> Iterator[tuple[Job, Int64]]:
        for kind in np.unique(kind_e):
            of_kind = np.flatnonzero(kind_e == kind)
            pages, page_of = np.unique(document_e[of_kind], return_inverse=True)
            cost = input_cost(index, pages, self.page_tokens)
            for part in cut(cost, self.mini_batch_size["document"], self.mini_batch_num_tokens["document"]):
                own = of_kind[np.isin(page_of, part)]
                yield pair_job(modality_name(int(kind)), query_e[own], document_e[own]), own


def pair_job(kind: str, query_n: Int64, document_n: Int64, *, needed: bool = False) -> Job:
    """The job that prepares pairs of input rows, in which each input is read once."""
    rows, place = np.unique(np.concatenate([query_n, document_n]), return_inverse=True)
    return Job("pair", kind, rows, needed, np.stack([place[: len(query_n)], place[len(query_n) :]], axis=1))
