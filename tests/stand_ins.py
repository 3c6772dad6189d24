"""What the examples name, as small as it can be, at the same places: models, data sets, PDFs' shards, a table of pages.

Everything lies in one folder under the name that an example says, so that nothing in an example has to be replaced for
it: `Qwen/Qwen3-VL-Embedding-2B` is a folder there, with a tiny model that embeds in as many dimensions.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pair_makers import YES_NO, page
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize
from tiny_towers import save_tiny_siglip, save_tiny_text_encoder

from farnear.ingest.synthetic import synthesise
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

VDR = "tomaarsen/llamaindex-vdr-en-train-preprocessed"
PAIRS, EVAL_QUERIES = 64, 3
# The real set has four on both sides.
NEGATIVES, EVAL_NEGATIVES = 2, 4


def embedder_of(folder: Path, dimension: int) -> None:
    """A tiny model whose embeddings are as wide as a large one's."""
    save_tiny_model(folder / "raw", hidden_size=32, num_layers=1)
    transformer, pooling, _ = load_model(ModelConfig(name_or_path=str(folder / "raw")))
    wider = Dense(32, dimension, bias=False, activation_function=torch.nn.Identity())
    SentenceTransformer(modules=[transformer, pooling, wider, Normalize()], device="cpu").save_pretrained(str(folder))


def reranker_of(folder: Path) -> None:
    """A tiny model that knows yes and no."""
    save_tiny_model(folder, texts=YES_NO, hidden_size=32, num_layers=1)


MODELS: dict[str, Callable[[Path], None]] = {
    "Qwen/Qwen3-VL-Embedding-2B": lambda folder: embedder_of(folder, 2048),
    "Qwen/Qwen3-VL-Reranker-2B": reranker_of,
    "sentence-transformers/all-MiniLM-L6-v2": lambda folder: save_tiny_text_encoder(folder) and None,
    "google/siglip2-base-patch16-512": lambda folder: save_tiny_siglip(folder, hidden_size=768) and None,
    "runs/tiny": lambda folder: save_tiny_model(folder) and None,
}
"""What stands for a model, by its name on the hub; the last is what the examples' own heads make."""


def make_data(place: Path) -> None:
    """Data sets of the hub, shards of PDFs that are not here, and `pairs.csv` with its pages."""
    folder = place / VDR
    folder.mkdir(parents=True)
    for config, pairs, negatives in (("train", PAIRS, NEGATIVES), ("eval", EVAL_QUERIES, EVAL_NEGATIVES)):
        seeds = iter(range(10_000 * len(config), 20_000 * len(config)))
        columns = {"query": [f"{config} query {number}" for number in range(pairs)]}
        for column in ("image", *(f"negative_{number}" for number in range(negatives))):
            columns[column] = [_png(next(seeds)) for _ in range(pairs)]
        pq.write_table(pa.table(columns), folder / f"{config}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("train", "eval"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    synthesise(place / "data" / "gnuplot", train_pairs=32, eval_pairs=EVAL_QUERIES, seed=0, size=(64, 64))
    (place / "pages").mkdir()
    with open(place / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "image"])
        for number in range(48):
            (place / "pages" / f"{number}.png").write_bytes(_png(number))
            rows.writerow([f"What is on page {number}?", f"pages/{number}.png"])


def _png(seed: int) -> bytes:
    stream = io.BytesIO()
    page(64, 64, seed).save(stream, "PNG")
    return stream.getvalue()
