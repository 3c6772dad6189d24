"""Rerankers: loading by head, two rows of the language-model head, gradients under every strategy, export."""

import json
from pathlib import Path
from typing import Any

import exactness
import pytest
import torch
from pair_makers import YES_NO, make_bases, mixed_pairs, page, raw_scores
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import Tensor

from farnear.errors import UserError
from farnear.model.embedder import to_device
from farnear.model.export import export_model
from farnear.model.image_features import images_apart
from farnear.model.load import load_model
from farnear.model.load_reranker import load_plain_reranker, load_reranker
from farnear.model.pairs import PairPicker, PairPreprocessing, image_features_of_job, pick_images
from farnear.model.reranker import Reranker, same_scores_shared
from farnear.model.score_layers import RowsLinear
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import choose_trainable
from farnear.parallel.strategy import Strategy, build_strategy
from farnear.parallel.world import World, start_world, stop_world
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig

CPU = torch.device("cpu")
HEADS = ("yes_no", "linear", "yes_no_linear")
PAIRS = mixed_pairs()
BOUND = 1e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"))


def sections(bases: Path, base: str, head: str | None, **keys: Any) -> tuple[ModelConfig, RerankerConfig]:
    section = RerankerConfig(head=head, chat_template=str(bases / "template.jinja"), **keys)
    return ModelConfig(name_or_path=str(bases / base)), section


def nudge(model: CrossEncoder) -> None:
    """Away from where heads begin, and from weights that are stored."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def trained(model: CrossEncoder) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("head", HEADS)
def test_scores_are_those_of_sentence_transformers(bases: Path, head: str, base: str) -> None:
    arguments = sections(bases, base, head, instruction="Find the page.")
    plain, model = load_plain_reranker(*arguments), load_reranker(*arguments)
    assert {type(module).__module__.split(".")[0] for module in plain} == {"sentence_transformers"}
    wanted = raw_scores(plain, PAIRS)
    assert torch.allclose(raw_scores(model, PAIRS), wanted, atol=1e-5)
    assert len(wanted.unique()) == len(PAIRS)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    if head != "linear":
        # A checkpoint's own two rows, computed in the plainest way.
        yes, no = model.tokenizer.convert_tokens_to_ids(["yes", "no"])
        yes_no = load_plain_reranker(*sections(bases, base, "yes_no", instruction="Find the page."))
        inner = yes_no.transformers_model
        inputs = PairPreprocessing(yes_no, shares_images=False)(PAIRS[:1])
        for name in ("modality", "num_images_per_sample", "logits_to_keep"):
            inputs.pop(name)
        with torch.no_grad():
            logits = inner(**to_device(inputs, CPU)).logits[0, -1]
        assert float(logits[yes] - logits[no]) == pytest.approx(float(wanted[0]), abs=1e-5)


def test_the_vocabulary_is_not_computed(bases: Path) -> None:
    for with_false_token in (True, False):
        plain = load_plain_reranker(*sections(bases, "untied", "yes_no"))
        if not with_false_token:
            plain[-1].false_token_id = None
            plain.save_pretrained(str(bases / "one-token"))
            plain = CrossEncoder(str(bases / "one-token"), device="cpu")
        wanted = raw_scores(plain, PAIRS)
        where = "untied" if with_false_token else "one-token"
        model = load_reranker(*sections(bases, where, "yes_no"))
        seen: list[torch.Size] = []
        model.transformers_model.lm_head.register_forward_hook(lambda _, __, logits, to=seen: to.append(logits.shape))
        assert torch.allclose(raw_scores(model, PAIRS), wanted, atol=1e-5)
        assert seen == [torch.Size([len(PAIRS), 1, 1 + with_false_token])]
    # It is checked against something: another row gives another score.
    model.transformers_model.lm_head.rows = (5,)
    assert not torch.allclose(raw_scores(model, PAIRS), wanted, atol=1e-3)


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_under_autocast_a_score_is_not_rounded_to_bf16(bases: Path, head: str) -> None:
    model = load_reranker(*sections(bases, "tied", head))
    job = PairPreprocessing(model, shares_images=True)(PAIRS[:3])
    picked, images = PairPicker(model)([job], [(0, 0), (0, 2)])
    whole = to_device({**picked, **pick_images([job], images)}, CPU)
    with torch.no_grad():
        exact, rounded = (Reranker(model, bf16=bf16)(whole) for bf16 in (False, True))
        assert rounded.dtype == torch.float32
        assert 1e-6 < (exact - rounded).abs().max() < 0.1
        assert not torch.equal(rounded, rounded.bfloat16().float())
        # As exact when shared.
        module = Reranker(model, bf16=True)
        tower = image_features_of_job(job)
        shared = images_apart(module(to_device(tower, CPU)), tower["image_grid_thw"])
        assert {one.dtype for one in shared} == {torch.float32}
        again = module({**to_device(picked, CPU), "image_features": tuple(shared[i] for _, i in images)})
        assert torch.allclose(again, rounded, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_without_weights_a_model_has_the_same_parts(bases: Path, exported: Path, head: str) -> None:
    own = [(ModelConfig(name_or_path=str(exported / head)), RerankerConfig())] if head != "yes_no_linear" else []
    for arguments in (*(sections(bases, base, head) for base in ("tied", "untied")), *own):
        hollow, whole = load_reranker(*arguments, with_weights=False), load_reranker(*arguments)
        assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}
        shapes = [[(n, p.shape, p.dtype) for n, p in model.named_parameters()] for model in (hollow, whole)]
        assert shapes[0] == shapes[1]
        assert [type(m) for m in hollow.modules()] == [type(m) for m in whole.modules()]


def test_a_random_head_is_the_same_everywhere(bases: Path) -> None:
    arguments = sections(bases, "tied", "linear")
    torch.manual_seed(1)
    first = load_reranker(*arguments)[-1].linear.weight
    torch.manual_seed(2)
    assert torch.equal(load_reranker(*arguments)[-1].linear.weight, first)
    assert first.std() > 0.01


BASES_AND_HEADS = (("tied", "yes_no"), ("untied", "yes_no"), ("tied", "linear"), ("untied", "yes_no_linear"))
PARTS = ("visual.blocks.0.attn.qkv.weight", "embed_tokens.weight", "lm_head.weight", "2.linear.weight")


def pairs_of(rank: int) -> list[tuple[Any, Any]]:
    """Unequal: rank 1 has half as many, and one image."""
    return PAIRS if rank == 0 else [PAIRS[3], PAIRS[1], PAIRS[0], PAIRS[5]]


def weight_of(rank: int) -> Tensor:
    """Of each pair's score in what is trained on."""
    return torch.linspace(-1.0, 2.0, len(pairs_of(rank)))


def plain_gradient(arguments: tuple[ModelConfig, RerankerConfig], world_size: int) -> tuple[dict[str, Tensor], float]:
    """Of sentence-transformers' own modules, every pair with its own pixels, in one process.

    Beside it a learning rate at which the update is as large as the weights, so that their rounding does not drown it.
    """
    model = load_plain_reranker(*arguments)
    preprocess = PairPreprocessing(model, shares_images=False)
    for rank in range(world_size):
        scores = model(to_device(preprocess(pairs_of(rank)), CPU))["scores"].squeeze(-1)
        ((scores * weight_of(rank)).sum() / world_size).backward()
    gradient = {f"model.{n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    weights = sum(float(p.detach().norm()) for p in model.parameters())
    return gradient, weights / sum(float(g.norm()) for g in gradient.values())


def backward_shared(
    strategy: Strategy, preprocess: PairPreprocessing, pick: PairPicker, rank: int, *, keeps_tower: bool
) -> None:
    """Images once; two mini-batches of pairs from them; then the tower backward, its graph kept or made anew."""
    pairs, weight_n = pairs_of(rank), weight_of(rank)
    job = preprocess(pairs)
    tower = to_device(image_features_of_job(job), CPU)
    with torch.set_grad_enabled(keeps_tower):
        outputs = images_apart(strategy.forward(tower), tower["image_grid_thw"])
    leaves = [one.detach().requires_grad_() for one in outputs]
    half = len(pairs) // 2
    with strategy.accumulate():
        for batch in (range(half), range(half, len(pairs))):
            features, images = pick([job], [(0, i) for i in batch])
            scores = strategy.forward(
                {**to_device(features, CPU), "image_features": tuple(leaves[i] for _, i in images)}
            )
            strategy.backward((scores * weight_n[list(batch)]).sum())
        if not keeps_tower:
            outputs = images_apart(strategy.forward(tower), tower["image_grid_thw"])
        strategy.backward(sum((one * leaf.grad).sum() for one, leaf in zip(outputs, leaves, strict=True)))


def shared_error(
    strategy_name: str, arguments: tuple[ModelConfig, RerankerConfig], world: World, *, keeps_tower: bool
) -> dict[str, float]:
    """Relative errors of an SGD update against the plain gradient, on rank 0: of all weights, and of some by name."""
    gradient, lr = plain_gradient(arguments, world.world_size)
    is_spread = strategy_name in ("zero3", "fsdp2")
    model = load_reranker(*arguments, with_weights=world.is_main or not is_spread)
    preprocess, pick = PairPreprocessing(model, shares_images=True), PairPicker(model)
    module = Reranker(model, bf16=False)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with exactness.parameters_split(strategy_name):
        strategy = build_strategy(exactness.run_config(strategy_name, "unused", 0.0), module, optimizer, world)
    assert same_scores_shared(strategy.forward, preprocess, pick, CPU)
    backward_shared(strategy, preprocess, pick, world.rank, keeps_tower=keeps_tower)
    strategy.step(lr)
    after = strategy.full_weights()
    if not after:
        return {}
    assert after.keys() == gradient.keys()
    update = {name: (before[name] - weight) / lr for name, weight in after.items()}
    errors = {"all": exactness.relative_error(update, gradient)}
    for part in PARTS:
        for name in gradient:
            if name.endswith(part):
                errors[part] = exactness.relative_error({name: update[name]}, {name: gradient[name]})
    return errors


def gradients_on_ranks(rank: int, world_size: int, folder: Path) -> None:
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    cases = [(strategy, base, head) for strategy in ("zero3", "fsdp2") for base, head in BASES_AND_HEADS]
    # A tied head has a sparse gradient, which is to come out dense.
    for strategy, base, head in (*cases, ("ddp", "tied", "yes_no"), ("zero2", "tied", "yes_no")):
        keeps_tower = (base, head) == ("tied", "yes_no")
        arguments = sections(folder, base, head)
        errors = shared_error(strategy, arguments, world, keeps_tower=keeps_tower)
        assert errors.pop("all", 0.0) < BOUND, (strategy, base, head)
        assert all(error < 10 * BOUND for error in errors.values()), (strategy, base, head, errors)
        assert len(errors) >= 2 * world.is_main
    stop_world()


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_through_shared_images_are_the_plain_ones(bases: Path, world_size: int) -> None:
    run_ranks(gradients_on_ranks, world_size, bases)


def exported_scores(
    arguments: tuple[ModelConfig, RerankerConfig], model: CrossEncoder, folder: Path
) -> tuple[Tensor, CrossEncoder]:
    """Of the trained model, and what its export loads as."""
    nudge(model)
    export_model(arguments[0], trained(model), folder, arguments[1])
    return raw_scores(model, PAIRS), CrossEncoder(str(folder), device="cpu")


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("head", HEADS)
def test_an_export_gives_the_same_scores(bases: Path, tmp_path: Path, head: str, base: str) -> None:
    arguments = sections(bases, base, head, instruction="Find the page.")
    model = load_reranker(*arguments)
    wanted, loaded = exported_scores(arguments, model, tmp_path / "export")
    assert torch.allclose(raw_scores(loaded, PAIRS), wanted, atol=1e-5)
    assert not torch.allclose(raw_scores(load_plain_reranker(*arguments), PAIRS), wanted, atol=1e-3)
    assert (loaded.default_prompt_name, loaded.prompts["instruction"]) == ("instruction", "Find the page.")
    assert loaded.processor.chat_template == (bases / "template.jinja").read_text()
    names = set(load_file(tmp_path / "export" / "model.safetensors"))
    stored = set(load_file(bases / base / "model.safetensors"))
    assert names == (stored if head == "yes_no" else stored - {"lm_head.weight"})
    modules = [one["type"] for one in json.loads((tmp_path / "export" / "modules.json").read_text())]
    assert all(name.startswith("sentence_transformers.") for name in modules), modules
    # It can be trained on: nothing has to be said of its head, template and prompt.
    again = load_reranker(ModelConfig(name_or_path=str(tmp_path / "export")), RerankerConfig())
    assert torch.allclose(raw_scores(again, PAIRS), wanted, atol=1e-5)
    assert isinstance(again[-1], LogitScore) == (head == "yes_no")
    if head == "yes_no":
        assert isinstance(again.transformers_model.lm_head, RowsLinear)


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_a_bf16_base_is_exported_in_bf16(tmp_path: Path, head: str) -> None:
    save_tiny_model(tmp_path / "base", texts=YES_NO, hidden_size=64, num_layers=1, dtype=torch.bfloat16)
    arguments = ModelConfig(name_or_path=str(tmp_path / "base")), RerankerConfig(head=head)
    model = load_reranker(*arguments)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    nudge(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    wanted, loaded = exported_scores(arguments, model, tmp_path / "export")
    assert {weight.dtype for weight in load_file(tmp_path / "export" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    scores = raw_scores(loaded, PAIRS)
    # It computes in bf16 there.
    assert torch.allclose(scores, wanted, atol=0.1)


def test_adapters_are_merged_and_the_head_trains_beside_them(bases: Path, tmp_path: Path) -> None:
    for head in ("yes_no", "linear"):
        config, section = sections(bases, "tied", head)
        config = config.model_copy(update={"lora": {"r": 4}})
        model = load_reranker(config, section)
        choose_trainable(model, config, seed=0)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        heads = [name for name in names if "lora_" not in name]
        assert heads == ([] if head == "yes_no" else ["2.linear.weight", "2.linear.bias"])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in names:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        export_model(config, trained(model), tmp_path / head, section)
        loaded = CrossEncoder(str(tmp_path / head), device="cpu")
        assert not [module for module in loaded.modules() if type(module).__module__.startswith("peft")]
        assert torch.allclose(raw_scores(loaded, PAIRS), raw_scores(model.eval(), PAIRS), atol=1e-5)
    config = config.model_copy(update={"lora": {"r": 4, "target_modules": ["lm_head"]}})
    model = load_reranker(config, RerankerConfig(head="yes_no"))
    choose_trainable(model, config, seed=0)
    with pytest.raises(UserError, match=r"target_modules names the language-model head, .* in model\.lora\.modules_to"):
        Reranker(model, bf16=False)


def test_with_a_frozen_backbone_the_head_stands_alone(bases: Path, tmp_path: Path) -> None:
    config, section = sections(bases, "tied", "linear")
    config = config.model_copy(update={"freeze": ("0",)})
    model = load_reranker(config, section)
    choose_trainable(model, config, seed=0)
    weights = trained(model)
    assert list(weights) == ["2.linear.weight", "2.linear.bias"]
    weights = {name: weight + 1.0 for name, weight in weights.items()}
    export_model(config, weights, tmp_path / "export", section)
    with safe_open(tmp_path / "export" / "2_Dense" / "model.safetensors", framework="pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "linear.weight": weights["2.linear.weight"].tolist(),
            "linear.bias": weights["2.linear.bias"].tolist(),
        }
    exported, stored = (load_file(path / "model.safetensors") for path in (tmp_path / "export", bases / "tied"))
    assert all(torch.equal(exported[name], weight) for name, weight in stored.items())


def test_an_embedder_becomes_a_reranker(bases: Path, tmp_path: Path) -> None:
    """Out of a SentenceTransformer comes its transformer; its prompts are not a reranker's."""
    for base in ("tied", "untied"):
        config = ModelConfig(name_or_path=str(bases / base), prompts={"query": "Find: "})
        embedder = load_model(config)
        export_model(config, dict(embedder.named_parameters()), tmp_path / base)
        for head in HEADS:
            _, section = sections(bases, base, head)
            of_embedder = ModelConfig(name_or_path=str(tmp_path / base))
            if base == "untied" and head != "linear":
                with pytest.raises(UserError, match=r"holds no language-model head .*; set reranker.head: linear"):
                    load_reranker(of_embedder, section)
                continue
            model = load_reranker(of_embedder, section)
            assert model.default_prompt_name is None
            of_base = load_reranker(ModelConfig(name_or_path=str(bases / base)), section)
            assert torch.allclose(raw_scores(model, PAIRS), raw_scores(of_base, PAIRS), atol=1e-5)


def test_without_a_template_a_raw_model_gets_farnears(bases: Path, tmp_path: Path) -> None:
    """The tiny model's prints every role by its name, and so do those of Qwen2-VL: that is not one for pairs."""
    model = load_reranker(ModelConfig(name_or_path=str(bases / "tied")), RerankerConfig(instruction="Find graphs."))
    features = PairPreprocessing(model, shares_images=True)([("costs", page(32, 32, 0)), (page(32, 32, 1), "a text")])
    texts = model.tokenizer.batch_decode(features["input_ids"])
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    for text, query, document in zip(texts, ("costs", picture), (picture, "a text"), strict=True):
        assert text.replace("<|endoftext|>", "").startswith("<|im_start|>system\nJudge whether the Document meets the")
        wanted = (
            f"<Instruct>: Find graphs.\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert text.endswith(wanted)
    # One that has words for a query and a document is kept.
    again = tmp_path / "with-template"
    save_tiny_model(again, texts=YES_NO, hidden_size=32, num_layers=1)
    (again / "chat_template.jinja").write_text((bases / "template.jinja").read_text())
    kept = load_reranker(ModelConfig(name_or_path=str(again)), RerankerConfig())
    assert kept.processor.chat_template == (bases / "template.jinja").read_text()


@pytest.fixture(scope="module")
def exported(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CrossEncoder of each kind."""
    folder = tmp_path_factory.mktemp("exported")
    for head in ("yes_no", "linear"):
        load_plain_reranker(*sections(bases, "tied", head)).save_pretrained(str(folder / head))
    return folder


@pytest.mark.parametrize(
    ("base", "reranker", "model", "message"),
    [
        ("yes_no", {"head": "linear"}, {}, r"has a head of its own \(yes_no\), but reranker.head says linear; take"),
        ("linear", {"head": "yes_no"}, {}, r"has a head of its own \(linear\), but reranker.head says yes_no; take"),
        ("yes_no", {"true_token": "a"}, {}, r"scores by the tokens \d+ and \d+, but those that the run file names are"),
        ("linear", {}, {"pooling": "mean"}, r"has its own pooling \(lasttoken\), but model.pooling says mean; take"),
        ("tied", {}, {"pooling": "mean"}, r"has no pooling: a score is read off the last token, but model.pooling"),
        ("tied", {"true_token": "maybe"}, {}, r"reranker.true_token: the tokenizer of .* no token 'maybe' .* of it\)"),
        ("tied", {"false_token": "yes"}, {}, r"are the same token of .*, so that every score is 0; name two"),
        (
            "tied",
            {"chat_template": "no/such.jinja"},
            {},
            r"chat_template no/such.jinja cannot be read .*; name a Jinja",
        ),
        (
            "tied",
            {"chat_template": "{{ 1 }}"},
            {},
            r"does not render a query and a document \(the 'query' and 'document'",
        ),
        ("tied", {"chat_template": "{{ oops("}, {}, r"does not render a query and a document \(it raised Templ"),
    ],
)
def test_what_contradicts_the_checkpoint_is_said_in_one_line(
    bases: Path,
    exported: Path,
    tmp_path: Path,
    base: str,
    reranker: dict[str, Any],
    model: dict[str, Any],
    message: str,
) -> None:
    if "{" in reranker.get("chat_template", ""):
        (tmp_path / "t.jinja").write_text(reranker["chat_template"])
        reranker = {"chat_template": str(tmp_path / "t.jinja")}
    path = (bases if base == "tied" else exported) / base
    with pytest.raises(UserError, match=message) as caught:
        load_reranker(ModelConfig(name_or_path=str(path), **model), RerankerConfig(**reranker))
    assert "\n" not in str(caught.value)


def test_the_same_head_may_be_said_again(exported: Path) -> None:
    for head, base in (("yes_no", "yes_no"), ("linear", "linear"), ("yes_no_linear", "linear")):
        section = RerankerConfig(head=head, **({} if head == "linear" else {"true_token": "yes", "false_token": "no"}))
        load_reranker(ModelConfig(name_or_path=str(exported / base)), section)


def test_a_checkpoint_that_lost_its_head_is_not_scored_by_random_rows(bases: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", texts=YES_NO, hidden_size=32, num_layers=1, tie_word_embeddings=False)
    path = tmp_path / "base" / "model.safetensors"
    save_file({n: w for n, w in load_file(path).items() if n != "lm_head.weight"}, path, metadata={"format": "pt"})
    for head in ("yes_no", "yes_no_linear"):
        with pytest.raises(UserError, match="holds no language-model head"):
            load_reranker(ModelConfig(name_or_path=str(tmp_path / "base")), RerankerConfig(head=head))
