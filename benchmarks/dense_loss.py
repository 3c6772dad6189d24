"""The contrastive objective from its definition, place by place and by autograd: the slow reference."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from farnear.loss.false_negatives import BatchFacts
from farnear.sections import LossConfig


def is_masked(direction: str, i: int, column: int, facts: BatchFacts) -> bool:
    """Whether a place is no negative, by plain comparison."""
    page, query = facts.page_hash_N.tolist(), facts.query_hash_B.tolist()
    answers = [set(row) for row in facts.answers_Bm.tolist()]
    positive, owner = facts.positive_B.tolist(), facts.owner_N.tolist()
    own_page = page[positive[i]]
    if direction in ("query_to_doc", "doc_to_doc"):
        if not facts.page_valid_N[column] and not (direction == "query_to_doc" and column == positive[i]):
            return True
        asks = [j for j in range(len(query)) if positive[j] == column]
        related = page[column] in answers[i] or any(query[j] == query[i] for j in asks)
        if direction == "query_to_doc":
            return column != positive[i] and related
        return related or owner[column] == i or any(own_page in answers[j] for j in asks)
    if not facts.pair_valid_B[column] and not (direction == "doc_to_query" and column == i):
        return True
    related = own_page in answers[column] or query[i] == query[column]
    if direction == "doc_to_query":
        return column != i and related
    return related or page[positive[column]] in answers[i]


def dense_loss(
    q_BD: Tensor, k_ND: Tensor, facts: BatchFacts, rows: slice, weight_b: Tensor, loss: LossConfig, scale: Tensor
) -> Tensor:
    """Weighted sum of the rows' losses."""
    total = q_BD.new_zeros(())
    dims = loss.matryoshka_dims or (q_BD.shape[1],)
    weights = loss.matryoshka_weights or (1.0,) * len(dims)
    positive = facts.positive_B.tolist()
    for dim, dim_weight in zip(dims, weights, strict=True):
        q, k = normalize(q_BD[:, :dim], dim=1), normalize(k_ND[:, :dim], dim=1)
        for place, i in enumerate(range(rows.start, rows.stop)):
            logits = []
            own_score = scale * q[i] @ k[positive[i]]
            limit = own_score.detach() - scale.detach() * (loss.margin or 0.0)
            if loss.margin_strategy == "relative":
                limit = own_score.detach() * (1 - (loss.margin or 0.0))
            for direction in loss.directions:
                row = q[i] if direction.startswith("query") else k[positive[i]]
                columns = k if direction.endswith("doc") else q
                of_direction = []
                for j, column in enumerate(columns):
                    if is_masked(direction, i, j, facts):
                        continue
                    score = scale * row @ column
                    own = {"query_to_doc": positive[i], "doc_to_query": i}.get(direction)
                    if loss.margin is not None and j != own and score > limit:
                        continue
                    if direction == "query_to_doc" and j != own:
                        is_hard = int(facts.owner_N[j]) == i
                        lifted = {"in_batch_negatives": not is_hard, "hard_negatives": is_hard, "all_negatives": True}
                        if loss.hardness_mode and lifted[loss.hardness_mode]:
                            score = score + loss.hardness_strength * (row @ column).detach()
                    of_direction.append(score)
                logits.append(torch.stack(of_direction) if of_direction else q.new_zeros(0))
            if loss.partition_mode == "joint":
                log_partition = torch.cat(logits).logsumexp(0)
            else:
                log_partition = torch.stack([part.logsumexp(0) for part in logits]).mean()
            total = total + dim_weight * weight_b[place] * (log_partition - own_score)
    return total
