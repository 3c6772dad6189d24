"""What a user's own loss module might hold."""

import itertools
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from farnear.loss.false_negatives import BatchFacts

CALLS = itertools.count(1)


def softmax(query_BD: Tensor, document_ND: Tensor, batch: BatchFacts) -> Tensor:
    """InfoNCE at scale 20 without any mask."""
    score_BN = 20.0 * normalize(query_BD, dim=1) @ normalize(document_ND, dim=1).T
    return cross_entropy(score_BN, batch.positive_B)


def paced(query_BD: Tensor, document_ND: Tensor, batch: BatchFacts) -> Tensor:
    """`softmax`, in a run that a test holds up: it takes as long as the file `pace` in the working folder says."""
    pace = Path("pace")
    time.sleep(float(pace.read_text()) if pace.exists() else 0.0)
    return softmax(query_BD, document_ND, batch)


def one_number_a_row(query_BD: Tensor, document_ND: Tensor, batch: BatchFacts) -> Tensor:
    """Not what is asked for."""
    return query_BD.sum(1)


def constant(query_BD: Tensor, document_ND: Tensor, batch: BatchFacts) -> Tensor:
    """Nothing to train by."""
    return torch.ones(())


def one_that_remembers(query_BD: Tensor, document_ND: Tensor, batch: BatchFacts) -> Tensor:
    """Softer with every call: no two steps have the same objective."""
    return softmax(query_BD, document_ND, batch) / next(CALLS)
