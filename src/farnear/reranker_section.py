"""Section `reranker` of a run file: where it stands, the run trains a cross-encoder and not an embedder.

A reranker reads a query and a page together and gives one score. A step's *list* is a query with its positive page and
negatives: hard ones from the shards or from `data.negatives`, and others from the global batch. Names and defaults are
those of sentence-transformers' CrossEncoder and its losses.
"""

from typing import Literal

from pydantic import Field, model_validator

from farnear.sections import Section

Head = Literal["yes_no", "linear", "yes_no_linear"]
ListLoss = Literal["listwise", "pairwise_logistic", "binary", "margin_mse", "listwise_distillation"]

DISTILLATIONS = ("margin_mse", "listwise_distillation")


class RerankerConfig(Section):
    """How the cross-encoder scores a pair, and what its lists are held to."""

    head: Head | None = None
    """What makes a score of the last token: yes_no, linear or yes_no_linear; unset: the checkpoint's, else yes_no."""
    true_token: str = Field(default="yes", min_length=1)
    """Token whose row of the language-model head stands for a match (heads yes_no and yes_no_linear)."""
    false_token: str = Field(default="no", min_length=1)
    """Token whose row stands for none."""
    instruction: str | None = None
    """What the model is told to judge by; saved as its default prompt. Unset: the checkpoint's own, if it has one."""
    chat_template: str | None = None
    """A Jinja file that renders a query and a document; unset: the checkpoint's where it does that, else farnear's."""
    loss: ListLoss = "listwise"
    """listwise softmax, pairwise_logistic, binary; margin_mse, listwise_distillation: from teacher's scores."""
    scale: float = Field(default=10.0, gt=0)
    """Factor on the activated scores in the listwise softmax."""
    activation_fn: Literal["sigmoid", "identity"] = "sigmoid"
    """What scores go through before the listwise softmax."""
    distillation_temperature: float = Field(default=1.0, gt=0)
    """Of both softmaxes in listwise_distillation."""
    num_negatives: int = Field(default=4, ge=0)
    """Negatives of each list that are other pairs' positives in the global batch, beside the hard ones."""
    sampling_strategy: Literal["random", "top"] = "random"
    """Any of the batch; or those nearest to the query by `embeddings`, for which a rank reads pages all over it."""
    embeddings: str | None = None
    """The folder `embeddings` that `farnear mine` has written of the same shards, for sampling_strategy top."""

    @model_validator(mode="after")
    def _fits_together(self) -> "RerankerConfig":
        if (self.sampling_strategy == "top") != (self.embeddings is not None):
            raise ValueError("sampling_strategy: top and embeddings belong together; set both or neither")
        if self.sampling_strategy == "top" and not self.num_negatives:
            raise ValueError("sampling_strategy chooses negatives of the batch, but num_negatives is 0; take it out")
        if self.loss in DISTILLATIONS and self.num_negatives:
            raise ValueError(
                f"loss {self.loss} learns from a teacher's scores, which negatives of the batch have none of; set "
                "num_negatives: 0"
            )
        defaults = type(self).model_fields
        for name, losses in (
            ("scale", ("listwise",)),
            ("activation_fn", ("listwise",)),
            ("distillation_temperature", ("listwise_distillation",)),
        ):
            if self.loss not in losses and getattr(self, name) != defaults[name].default:
                raise ValueError(f"{name} belongs to loss {losses[0]}, not to {self.loss}; take it out")
        if self.head == "linear":
            for name in ("true_token", "false_token"):
                if getattr(self, name) != defaults[name].default:
                    raise ValueError(f"{name} belongs to the heads yes_no and yes_no_linear; take it out")
        return self
