"""The contrastive objective and distillation from their definitions, by autograd: the slow reference."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, mse_loss, normalize

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


def dense_distillation(
    q_BD: Tensor, k_ND: Tensor, facts: BatchFacts, teacher_N: Tensor, loss: LossConfig, scale: Tensor
) -> Tensor:
    """Mean over the lists that count: a pair's positive, then its hard negatives, as far as a teacher knows them."""
    dims = loss.matryoshka_dims or (q_BD.shape[1],)
    weights = loss.matryoshka_weights or (1.0,) * len(dims)
    of_lists = []
    for i, positive in enumerate(facts.positive_B.tolist()):
        own = [n for n in range(len(k_ND)) if int(facts.owner_N[n]) == i and n != positive]
        usable = [n for n in (positive, *own) if facts.page_valid_N[n] and teacher_N[n].isfinite()]
        if not facts.pair_valid_B[i] or positive not in usable or len(usable) < 2:
            continue
        teacher = teacher_N[usable]
        total = q_BD.new_zeros(())
        for dim, weight in zip(dims, weights, strict=True):
            student = scale * cosine_similarity(q_BD[i, :dim], k_ND[usable][:, :dim], dim=-1)
            if loss.distillation == "margin_mse":
                total = total + weight * mse_loss(student[0] - student[1:], teacher[0] - teacher[1:])
            else:
                p, t = (x / loss.distillation_temperature for x in (student, teacher))
                total = total + weight * kl_div(p.log_softmax(0), t.softmax(0), reduction="sum")
        of_lists.append(total)
    return torch.stack(of_lists).mean() if of_lists else q_BD.new_zeros(())
