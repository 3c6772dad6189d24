"""From a checkpoint's name to a ``CrossEncoder`` that is ready to train; the sibling of `farnear.model.load`.

Three kinds of checkpoint are accepted: a CrossEncoder with image support, which keeps its modules, head, prompts and
template; a model for sequence classification, which is one too; and a vision-language model, raw or out of a
SentenceTransformer, which gets a head by name (`farnear.model.heads`) and, where its chat template does not know a
query and a document, farnear's own (reranker.jinja, in the manner of Qwen3-VL-Reranker).
"""

import re
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modality import InputFormatter
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from farnear.errors import UserError
from farnear.model.attention_choice import refuse_kernels
from farnear.model.heads import (
    OwnHead,
    dense_head,
    head_of,
    refuse_missing_head,
    row_difference,
    score_cheaply,
    token_ids,
)
from farnear.model.load import (
    LoadingArguments,
    bring_to,
    loading_arguments,
    refuse_text_alone,
    settle,
    told_to_the_user,
)
from farnear.model.stored import stored_config, stored_file, stored_kind
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig

INSTRUCTION = "instruction"
"""Name of the prompt that reranker.instruction becomes."""

_TEMPLATE = Path(__file__).with_name("reranker.jinja")


def load_reranker(
    config: ModelConfig,
    reranker: RerankerConfig,
    *,
    dtype: torch.dtype = torch.float32,
    with_weights: bool = True,
) -> CrossEncoder:
    """Load a model on the CPU, as `load_plain_reranker`, whose head computes no more than training needs.

    Its scores are those of the plain one; do not save it, but export.
    """
    model = load_plain_reranker(config, reranker, dtype=dtype, with_weights=with_weights)
    score_cheaply(model)
    return model


def load_plain_reranker(
    config: ModelConfig,
    reranker: RerankerConfig,
    *,
    dtype: torch.dtype = torch.float32,
    with_weights: bool = True,
) -> CrossEncoder:
    """Load a model of sentence-transformers' own modules on the CPU, with weights of one type.

    Args:
        config: Section `model` of the run file.
        reranker: Section `reranker`.
        dtype: fp32, or bf16 for training.pure_bf16.
        with_weights: False builds it on the meta device, its head included, without reading weights.

    Raises:
        UserError: The checkpoint cannot be loaded, reads no images, contradicts a section or lacks what the head needs,
            or its chat template cannot be read or does not render a query and a document.
    """
    arguments = loading_arguments(config, dtype=dtype, with_weights=with_weights)
    if reranker.chat_template is not None:
        arguments.processor["chat_template"] = _template_of_run_file(reranker.chat_template)
    with told_to_the_user(config):
        settings = stored_config(config)
        refuse_kernels(config, settings)
        is_own_model = _is_cross_encoder(config, settings)
        if is_own_model:
            model = _load_whole(config, arguments, with_weights=with_weights)
        else:
            model = _load_with_head(config, reranker, arguments, with_weights=with_weights)
    _refuse_contradictions(model, config, reranker)
    refuse_text_alone(model, config)
    settle(model, config, arguments)
    _settle_template(model, config, reranker, is_own_model=is_own_model)
    if reranker.instruction is not None:
        model.prompts[INSTRUCTION] = reranker.instruction
        model.default_prompt_name = INSTRUCTION
    bring_to(dtype, model)
    return model


def _is_cross_encoder(config: ModelConfig, settings: dict[str, Any]) -> bool:
    if stored_file(config, "modules.json") is not None:
        return stored_kind(config) == "CrossEncoder"
    return any(name.endswith("ForSequenceClassification") for name in settings.get("architectures") or ())


def _load_whole(config: ModelConfig, arguments: LoadingArguments, *, with_weights: bool) -> CrossEncoder:
    return CrossEncoder(
        config.name_or_path,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        prompts=config.prompts,
        device="cpu" if with_weights else None,
        model_kwargs=arguments.model,
        processor_kwargs=arguments.processor,
    )


def _load_with_head(
    config: ModelConfig, reranker: RerankerConfig, arguments: LoadingArguments, *, with_weights: bool
) -> CrossEncoder:
    head = reranker.head or "yes_no"
    shared = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    transformer = Transformer(
        config.name_or_path,
        transformer_task="any-to-any" if head == "yes_no" else "feature-extraction",
        model_kwargs={**shared, **arguments.model},
        processor_kwargs={**shared, **arguments.processor},
        config_kwargs=shared,
    )
    # The last position is then that of a real token, whatever stands beside it in a mini-batch.
    tokenizer: Any = transformer.tokenizer
    tokenizer.padding_side = "left"
    modules: list[nn.Module] = [transformer]
    if head == "yes_no":
        true_id, false_id = token_ids(tokenizer, config, reranker)
        refuse_missing_head(transformer.model, config)
        modules.append(LogitScore(true_id, false_id))
    else:
        width = transformer.get_embedding_dimension()
        weight_D = None
        if head == "yes_no_linear":
            ids = token_ids(tokenizer, config, reranker)
            weight_D = row_difference(transformer.model, config, ids) if with_weights else None
        modules += [Pooling(width, config.pooling or "lasttoken"), dense_head(width, weight_D)]
    return CrossEncoder(modules=modules, device="cpu" if with_weights else "meta", prompts=config.prompts)


def _refuse_contradictions(model: CrossEncoder, config: ModelConfig, reranker: RerankerConfig) -> None:
    if model.num_labels != 1:
        raise UserError(
            f"model {config.name_or_path} gives {model.num_labels} scores a pair, and a list is ranked by one; set "
            "model.name_or_path to a model with one"
        )
    own = head_of(model)
    heads: dict[OwnHead, tuple[str | None, ...]] = {
        "yes_no": (None, "yes_no"),
        "linear": (None, "linear", "yes_no_linear"),
        "sequence-classification": (None,),
    }
    if reranker.head not in heads[own]:
        raise UserError(
            f"model {config.name_or_path} has a head of its own ({own}), but reranker.head says {reranker.head}; take "
            "reranker.head out of the run file"
        )
    if own == "yes_no" and reranker.model_fields_set & {"true_token", "false_token"}:
        ids = token_ids(model.tokenizer, config, reranker)
        score: Any = model[-1]
        stored = (score.true_token_id, score.false_token_id)
        if ids != stored:
            raise UserError(
                f"model {config.name_or_path} scores by the tokens {stored[0]} and {stored[1]}, but those that the run "
                f"file names are {ids[0]} and {ids[1]}; take reranker.true_token and false_token out of it"
            )
    poolings = [str(module.pooling_mode) for module in model if isinstance(module, Pooling)]
    if config.pooling is not None and poolings != [config.pooling]:
        raise UserError(
            f"model {config.name_or_path} with this head has "
            + (f"its own pooling ({poolings[0]})" if poolings else "no pooling: a score is read off the last token")
            + f", but model.pooling says {config.pooling}; take model.pooling out of the run file"
        )


def _template_of_run_file(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"reranker.chat_template {name} cannot be read ({error}); name a Jinja file") from None


def _settle_template(model: CrossEncoder, config: ModelConfig, reranker: RerankerConfig, *, is_own_model: bool) -> None:
    """Leave a chat template that renders a query and a document, where the model takes messages."""
    transformer: Any = model[0]
    if reranker.chat_template is not None:
        if failure := _failure(transformer):
            raise UserError(
                f"reranker.chat_template {reranker.chat_template} does not render a query and a document ({failure}); "
                "the roles of its messages are query, document, and system for the instruction"
            )
    elif is_own_model:
        # One without messages has a tokenizer's pairs of texts.
        if "message" in transformer.modality_config and _failure(transformer):
            _give_own_template(transformer, config)
    elif _failure(transformer) or not _names_roles(transformer):
        _give_own_template(transformer, config)
        transformer.modality_config, transformer.module_output_name = transformer.infer_modalities(
            transformer.model, transformer.processor
        )
        transformer.input_formatter.supported_modalities = list(transformer.modality_config)


def _failure(transformer: Transformer) -> str | None:
    """Why the template does not render a pair; None if it does."""
    settings = dict(transformer.processing_kwargs.get("chat_template") or {})
    for name in ("restore_suffix", "padding", "truncation", "max_length", "return_tensors"):
        settings.pop(name, None)  # of sentence-transformers' or the tokenizer's, not the template's
    failure = transformer.input_formatter.pair_roles_failure(settings)
    return None if failure is None else " ".join(failure.split())[:200]


def _names_roles(transformer: Transformer) -> bool:
    """Whether a template has words for a query and a document; a general one prints any role as it is called."""
    messages = transformer.input_formatter.pair_to_messages(("alpha", "bravo"))
    renamed = [{**message, "role": f"un{message['role']}"} for message in messages]
    rendered = str(transformer.processor.apply_chat_template(messages, tokenize=False))
    try:
        other = str(transformer.processor.apply_chat_template(renamed, tokenize=False))
    except Exception:  # whatever a template raises at a role that it does not know
        return True
    return rendered != other.replace("unquery", "query").replace("undocument", "document")


def _give_own_template(transformer: Any, config: ModelConfig) -> None:
    text = _TEMPLATE.read_text(encoding="utf-8")
    if unknown := sorted(set(re.findall(r"<\|\w+\|>", text)) - transformer.tokenizer.get_vocab().keys()):
        raise UserError(
            f"the chat template of {config.name_or_path} knows no query and no document, and farnear's own is for the "
            f"Qwen family (the tokenizer has no {unknown[0]}); set reranker.chat_template to a Jinja file that does"
        )
    transformer.processor.chat_template = text
    modalities = transformer.input_formatter.supported_modalities
    transformer.input_formatter = InputFormatter(
        transformer.config.model_type, processor=transformer.processor, supported_modalities=modalities
    )
