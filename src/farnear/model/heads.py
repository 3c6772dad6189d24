"""What makes a score of a pair's last token, by name, and how it is computed while it trains.

    yes_no          logit of one token less that of another, from the language-model head (LogitScore)
    linear          pooling and a dense layer of one output
    yes_no_linear   the same, beginning as the difference of the two tokens' rows, so with yes_no's scores

sentence-transformers lets the language-model head compute its whole vocabulary and takes two logits. In training the
head multiplies with these two rows alone (`score_cheaply`), at the last position. It does that in its own forward,
under the hooks of whatever strategy has spread its weight over ranks, and stays the layer that it was, with its weight,
its name and its tie to the embeddings. Heads compute in fp32 under autocast too: a logit of 20 in bf16 is a multiple of
1/8, as large as the differences that a ranking is made of.

What is exported is sentence-transformers' own: the export loads a model that none of this was done to.
"""

from typing import Any, Literal

import torch
from safetensors import safe_open
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import Tensor, nn

from farnear.errors import UserError
from farnear.model.score_layers import RowsLinear, ScoreLinear
from farnear.model.stored import weight_files
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig

OwnHead = Literal["yes_no", "linear", "sequence-classification"]

_HEAD_OF_LANGUAGE_MODEL = "lm_head.weight"


class RowsScore(LogitScore):
    """LogitScore over the logits of `RowsLinear`."""

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Puts ``scores`` [n, 1] into the features."""
        logit_nr = features[self.module_input_name][:, -1]
        features["scores"] = logit_nr[:, :1] - logit_nr[:, 1:] if self.false_token_id is not None else logit_nr
        return features


def head_of(model: CrossEncoder) -> OwnHead:
    """The head that a model has; one that began as yes_no_linear is linear."""
    last = model[-1]
    if isinstance(last, LogitScore):
        return "yes_no"
    return "linear" if isinstance(last, Dense) else "sequence-classification"


def score_cheaply(model: CrossEncoder) -> None:
    """Let the model's head compute what its score needs, in fp32; in place, its weights and their names unchanged."""
    last = model[-1]
    # Exactly these classes: what others have derived from them is theirs.
    if type(last) is Dense and type(last.linear) is nn.Linear:
        last.linear.__class__ = ScoreLinear
    if type(last) is not LogitScore or not isinstance(model[0], Transformer):
        return
    inner: Any = model[0].model
    vocabulary = inner.get_output_embeddings()
    is_plain = type(vocabulary) is nn.Linear
    if not is_plain or model[0].module_output_name != last.module_input_name:
        return
    rows = tuple(row for row in (last.true_token_id, last.false_token_id) if row is not None)
    vocabulary.__class__, vocabulary.rows = RowsLinear, rows
    last.__class__ = RowsScore


def find_tied_rows(model: CrossEncoder) -> None:
    """Let the gradients of rows be sparse where the head is the embedding layer.

    They spare the backward pass zeros for the whole vocabulary. The embedding layer's gradient, in the same pass, makes
    the sum a dense one; without it the parameter would be left with a sparse one, which not every strategy can take.
    Asked of a model whose adapters are in place: they may have copied its head.
    """
    inner: Any = model.transformers_model
    for module in model.modules():
        if isinstance(module, RowsLinear):
            module.sparse = module.weight is getattr(inner.get_input_embeddings(), "weight", None)


def refuse_adapted_rows(model: CrossEncoder) -> None:
    """Raise ``UserError`` where LoRA stands in the language-model head of which two rows are computed."""
    inner: Any = model.transformers_model
    if isinstance(model[-1], RowsScore) and hasattr(inner.get_output_embeddings(), "lora_A"):
        raise UserError(
            "model.lora.target_modules names the language-model head, of which a reranker computes two rows only; take "
            "it out, or name it in model.lora.modules_to_save to train it whole"
        )


def token_ids(tokenizer: Any, config: ModelConfig, reranker: RerankerConfig) -> tuple[int, int]:
    """Of the true and the false token.

    Raises:
        UserError: The tokenizer does not have one of them as a token of its own, or both are the same.
    """
    ids = []
    for name in ("true_token", "false_token"):
        token = getattr(reranker, name)
        found = tokenizer.encode(token, add_special_tokens=False)
        if len(found) != 1 or found[0] == tokenizer.unk_token_id:
            # As it is spelled in the vocabulary, such as "Ġyes".
            known = tokenizer.get_vocab().get(token)
            if known is None:
                raise UserError(
                    f"reranker.{name}: the tokenizer of {config.name_or_path} has no token '{token}' (it makes "
                    f"{len(found)} of it), so no row of the language-model head stands for it; name another, or set "
                    "reranker.head: linear"
                )
            found = [known]
        ids.append(int(found[0]))
    if ids[0] == ids[1]:
        raise UserError(
            f"reranker.true_token and false_token are the same token of {config.name_or_path}, so that every score is "
            "0; name two"
        )
    return ids[0], ids[1]


def dense_head(width: int, weight_D: Tensor | None) -> Dense:
    """A dense layer from a pooled token to a score.

    Args:
        width: D.
        weight_D: What it begins as. None: random numbers, the same on every rank and in every export, where a head that
            was frozen has to be found again, so their seed is fixed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Dense(width, 1, activation_function=nn.Identity(), module_output_name="scores")
    with torch.no_grad():
        head.linear.bias.zero_()
        if weight_D is not None:
            head.linear.weight.copy_(weight_D[None])
    return head


def row_difference(inner: Any, config: ModelConfig, ids: tuple[int, int]) -> Tensor:
    """Row of the true token less that of the false one, float32 [D], of the checkpoint's language-model head.

    Args:
        inner: The transformers model, loaded without that head.

    Raises:
        UserError: The checkpoint holds no such head.
    """
    if is_tied(inner):
        rows_2D = inner.get_input_embeddings().weight[list(ids)]
        return (rows_2D[0].float() - rows_2D[1].float()).detach()
    path, name = _stored_head(config)
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(name)
        true_D, false_D = (stored[row : row + 1][0].float() for row in ids)
    return true_D - false_D


def refuse_missing_head(inner: Any, config: ModelConfig) -> None:
    """Raise ``UserError`` where transformers has made up a language-model head that the checkpoint does not hold."""
    if not is_tied(inner):
        _stored_head(config)


def is_tied(inner: Any) -> bool:
    """Whether the language-model head is the embedding layer."""
    return bool(getattr(inner.config, "tie_word_embeddings", False))


def _stored_head(config: ModelConfig) -> tuple[str, str]:
    for path in weight_files(config):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                if name == _HEAD_OF_LANGUAGE_MODEL or name.endswith(f".{_HEAD_OF_LANGUAGE_MODEL}"):
                    return str(path), name
    raise UserError(
        f"model {config.name_or_path} holds no language-model head ({_HEAD_OF_LANGUAGE_MODEL} in safetensors), so its "
        "tokens have no rows to score by; set reranker.head: linear, or a base model with a head"
    )
