"""Which part of a model reads an input, and which parts nothing that is read ever reaches.

The first module of a SentenceTransformer reads its inputs. Where that is a Router, it hands each on to one of its
routes, by the input's side (query, document) and kind, and the route's first module reads. A kind is what the index
calls it: ``text``, ``image+text``, ...; chat messages are ``message``, with the media in them ``image+message``.

A dual encoder (CLIP, SigLIP, CLAP) that a Router gives images alone has a text half that nothing goes through, in some
of them the larger one. Its own scale no embedding depends on either. Trained, such parts would cost memory and traffic,
and weight decay would wear them down. So a run leaves them out, and an export has them as they were.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a plan needs neither the model nor the seconds of this import
    from sentence_transformers.base.modality_types import Modality
    from sentence_transformers.base.model import BaseModel

KINDS = ("text", "image", "audio", "video")
SIDES = ("document", "query")

# How dual encoders of transformers call what belongs to a kind, by the first word; a scale belongs to none.
_OWNERS = {"text": "text", "vision": "image", "visual": "image", "image": "image", "audio": "audio", "logit": "none"}
# Whose embeddings those of joined models are projected to: the first of these that there is.
_LEADERS = ("document", "image", "video", "audio")


def is_router(module: Any) -> bool:
    """Whether a module is a Router."""
    return hasattr(module, "route_mappings")


def reader_of(model: "BaseModel", side: str, kind: str) -> Any:
    """The module that reads inputs of a kind; None where a Router has no route for them.

    Args:
        side: "query" or "document"; "pair" of a cross-encoder.
    """
    first: Any = model[0]
    if not is_router(first):
        return first
    try:
        route = first._resolve_route(task=side, modality=_word(kind))
    except ValueError:
        return None
    return first.sub_modules[str(route)][0]


def takes(model: "BaseModel", side: str, kind: str) -> bool:
    """Whether the model reads inputs of a kind on a side."""
    reader = reader_of(model, side, kind)
    known = getattr(reader, "modalities", ["text"]) if reader is not None else []
    word, parts = _word(kind), set(kind.split("+"))
    if len(parts) > 1 and "message" in known:
        # Messages are how several kinds get into one input.
        return parts <= set(known)
    return word in known


def modalities_of(model: "BaseModel") -> str:
    """All that a model reads, in words."""
    known = model.modalities
    # Where there are messages any of the single ones go together.
    singles = [kind for kind in known if isinstance(kind, str)]
    return ", ".join(
        singles if "message" in known else ["+".join(one) if isinstance(one, tuple) else one for one in known]
    )


def readers(model: "BaseModel") -> list[Any]:
    """The modules that read anything, each once."""
    first: Any = model[0]
    found = [route[0] for route in first.sub_modules.values()] if is_router(first) else [first]
    return list({id(reader): reader for reader in found}.values())


def readers_of_pages(model: "BaseModel") -> list[Any]:
    """The modules that read images, each once, the documents' first."""
    asked = [(side, kind) for side in SIDES for kind in ("image", "image+text", "image+message")]
    found = [reader_of(model, side, kind) for side, kind in asked if takes(model, side, kind)]
    return list({id(reader): reader for reader in found}.values())


def combinations_of(reader: Any) -> "list[tuple[str, ...]]":
    """Kinds that a module reads together in one input, as sentence-transformers writes them."""
    known = getattr(reader, "modalities", ["text"])
    together = {tuple(sorted(kind)) for kind in known if isinstance(kind, tuple)}
    if "message" in known:
        singles = [kind for kind in sorted(KINDS) if kind in known]
        together |= {of for size in range(2, len(singles) + 1) for of in combinations(singles, size)}
    return sorted(together)


def know_combinations(model: "BaseModel") -> None:
    """Let the modules of a Router compute what they read; in place.

    A Router says in the features which kinds it was given. A module makes chat messages of several kinds, computes
    those, and does not know the kinds' own name.
    """
    if not is_router(model[0]):
        return
    for reader in readers(model):
        if how := getattr(reader, "modality_config", {}).get("message"):
            plain = {key: value for key, value in how.items() if key != "format"}
            for kinds in combinations_of(reader):
                reader.modality_config.setdefault(kinds, plain)


def leader_of(routes: Collection[str]) -> str:
    """Of models that are joined the one whose embeddings' width is that of all."""
    return next(name for name in (*_LEADERS, *routes) if name in routes)


def routes_of_kinds(read: Mapping[str, Collection[Any]]) -> dict[Any, str]:
    """Which of joined models each kind goes to: the one named for it, else the first that reads it, media's first.

    Args:
        read: Kinds, or combinations of them, that a model reads, by the name of its route.
    """
    routes = {name: name for name in read}
    for name, kinds in sorted(read.items(), key=lambda one: one[0] == "text"):
        for kind in kinds:
            routes.setdefault(kind, name)
    return routes


def unreached(model: Any) -> list[str]:
    """Names of the modules and parameters of dual encoders that no input goes through."""
    if hasattr(model, "unreached"):  # a plan's stand-in knows of itself
        return list(model.unreached())
    names = {id(module): name for name, module in model.named_modules()}
    return [
        f"{names[id(reader.model)]}.{name}"
        for reader in readers(model)
        if _is_dual(reader)
        for name in parts_beside(
            reader.model, {kind for side in SIDES for kind in KINDS if _reads(model, side, kind, reader)}
        )
    ]


def freeze_unreached(model: Any) -> None:
    """Do not train what no input goes through; in place."""
    for name in unreached(model):
        owner, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(owner), leaf).requires_grad_(False)


def leave_out_unreached(model: Any) -> None:
    """Take out of a model that is only to be trained what no input goes through; in place.

    The last thing to do to it: its methods that look at the whole find nothing there.
    """
    for name in unreached(model):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, None)


def parts_beside(inner: Any, kinds: Collection[str]) -> Iterator[str]:
    """Names of the children and parameters of a dual encoder of transformers that inputs of some kinds do not meet."""
    for name, _ in (*inner.named_children(), *inner.named_parameters(recurse=False)):
        owner = _OWNERS.get(name.partition("_")[0])
        if owner is not None and owner not in kinds:
            yield name


def _is_dual(reader: Any) -> bool:
    """Whether a module has a way of its own for each kind."""
    ways = getattr(reader, "modality_config", None)
    return ways is not None and all(how["method"] != "forward" for how in ways.values())


def _reads(model: "BaseModel", side: str, kind: str, reader: Any) -> bool:
    return reader_of(model, side, kind) is reader and takes(model, side, kind)


def _word(kind: str) -> "Modality":
    """As sentence-transformers calls a kind."""
    parts: list[Any] = sorted(kind.split("+"))
    word: Any = "message" if "message" in parts else tuple(parts) if len(parts) > 1 else kind
    return word
