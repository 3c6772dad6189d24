"""A loss of the user's own: embeddings in, one scalar out, through the same gradient cache.

The run file names it, ``loss: package.module:function``, and it is called as

    function(query_BD, document_ND, batch) -> loss

    def softmax(query_BD, document_ND, batch):
        return cross_entropy(20 * normalize(query_BD) @ normalize(document_ND).T, batch.positive_B)

with float32 embeddings and a `BatchFacts` that says which document is which query's positive or hard negative, and by
hashes what is alike: duplicates are for the function to mask. Quarantined pairs are left out before it is called. It
may use autograd as it likes: the embeddings are leaves.

With ``loss.gather``, the default, the embeddings are those of all ranks. Every rank then computes the same number, so
the training does not depend on how many ranks there are; what it must not do is to draw random numbers of its own.
Without, they are the rank's own, and the objective is the mean over the ranks of what each computed.

Matryoshka dimensions are taken as sentence-transformers' MatryoshkaLoss takes them: the function is called with each
prefix, normalised, and the results are weighted and summed.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from farnear.errors import UserError
from farnear.loss.false_negatives import BatchFacts
from farnear.sections import LossConfig

OwnLoss = Callable[[Tensor, Tensor, BatchFacts], Tensor]


def load_own_loss(name: str) -> OwnLoss:
    """The function that ``package.module:function`` names.

    Raises:
        UserError: It cannot be imported, or is nothing that can be called.
    """
    module_name, _, function_name = name.partition(":")
    # Where the run is started, as `python -m` looks there; a launched script has only its own folder.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"loss.function: {module_name} cannot be imported ({type(error).__name__}: {error}); start the run in "
            "its folder, put that on PYTHONPATH, or install it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"loss.function: {module_name} has no function {function_name}; name one that it defines")
    return function


def own_gradient(
    function: OwnLoss, query_BD: Tensor, document_ND: Tensor, facts: BatchFacts, loss: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient by the queries, by the documents), all float32; zero for what is quarantined.

    Raises:
        UserError: The function gave something else than one number that depends on the embeddings.
    """
    rows_B, rows_N, facts = usable(facts)
    gradients = torch.zeros_like(query_BD), torch.zeros_like(document_ND)
    if not len(rows_B):
        return query_BD.new_zeros(()), *gradients
    of_loss, dq_BD, dk_ND = _gradient_of_usable(function, query_BD[rows_B], document_ND[rows_N], facts, loss)
    return of_loss, gradients[0].index_copy_(0, rows_B, dq_BD), gradients[1].index_copy_(0, rows_N, dk_ND)


def usable(facts: BatchFacts) -> tuple[Tensor, Tensor, BatchFacts]:
    """The pairs and documents that count, as rows of all, and what is known of them: their numbers are new ones."""
    is_usable_B = facts.pair_valid_B & facts.page_valid_N[facts.positive_B]
    rows_B, rows_N = is_usable_B.nonzero().flatten(), facts.page_valid_N.nonzero().flatten()
    number_of_B = torch.where(is_usable_B, is_usable_B.cumsum(0) - 1, -1)
    number_of_N = facts.page_valid_N.cumsum(0) - 1
    return (
        rows_B,
        rows_N,
        BatchFacts(
            query_hash_B=facts.query_hash_B[rows_B],
            pair_valid_B=facts.pair_valid_B[rows_B],
            answers_Bm=facts.answers_Bm[rows_B],
            positive_B=number_of_N[facts.positive_B[rows_B]],
            page_hash_N=facts.page_hash_N[rows_N],
            owner_N=number_of_B[facts.owner_N[rows_N]],
            page_valid_N=facts.page_valid_N[rows_N],
        ),
    )


def _gradient_of_usable(
    function: OwnLoss, query_BD: Tensor, document_ND: Tensor, facts: BatchFacts, loss: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    query_BD, document_ND = (x.detach().requires_grad_() for x in (query_BD, document_ND))

    def number(query: Tensor, document: Tensor) -> Tensor:
        result = function(query, document, facts)
        if not isinstance(result, Tensor) or result.numel() != 1 or not result.requires_grad:
            raise UserError(
                f"loss.function: {loss.function} gave {_shown(result)}, not one number that depends on the embeddings; "
                "return a scalar tensor computed from them"
            )
        return result.float().sum()

    if loss.matryoshka_dims is None:
        total = number(query_BD, document_ND)
    else:
        weights = loss.matryoshka_weights or (1.0,) * len(loss.matryoshka_dims)
        prefixes = [[normalize(x[:, :dim], dim=1) for x in (query_BD, document_ND)] for dim in loss.matryoshka_dims]
        total = torch.stack([weight * number(*pair) for pair, weight in zip(prefixes, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, (query_BD, document_ND), allow_unused=True)
    dq_BD, dk_ND = (
        torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip((query_BD, document_ND), gradients, strict=True)
    )
    return total.detach(), dq_BD, dk_ND


def _shown(total: object) -> str:
    return f"a tensor of shape {list(total.shape)}" if isinstance(total, Tensor) else f"a {type(total).__name__}"
