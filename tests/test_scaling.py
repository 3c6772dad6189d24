"""benchmarks/scaling.py in small: what a step sends does not depend on W or the mini-batches, and is near the least."""

import json
from pathlib import Path
from typing import Any

import pytest
import scaling
import scaling_least
import scaling_table
from ranks import run_ranks

from farnear.model.embedder import Embedder
from farnear.model.tiny import save_tiny_model

DOCS = Path(__file__).parent.parent / "docs" / "scaling.md"
WEAK, MINI_BATCHES = scaling.SETTINGS[:2]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "base"
    return str(save_tiny_model(folder, texts=["a chart"], hidden_size=scaling.WIDTH, num_layers=2))


@pytest.fixture(scope="module")
def rows(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    both, one = (WEAK, MINI_BATCHES), (WEAK,)
    wanted = {
        2: {"ddp": both, "zero3": both, "fsdp2": one, "zero2-mini_batch": both},
        3: {"ddp": one, "zero3": one},
    }
    found = []
    for world_size, of_strategy in wanted.items():
        out = tmp_path_factory.mktemp("rows") / "rows.json"
        run_ranks(scaling.count, world_size, model_path, of_strategy, str(out))
        found += json.loads(out.read_text())
    return found


def test_calls_are_constant_and_bytes_near_the_least(rows: list[dict[str, Any]]) -> None:
    summary = scaling.summarise(rows)
    eager = summary.pop("zero2-mini_batch")
    assert scaling.is_good(summary)
    assert {figures["exchange_calls"] for figures in summary.values()} == {3}
    assert summary["ddp"]["reduction_calls"] == 1
    # Gradients that meet after each mini-batch: what a reduction too many would look like.
    assert eager["constant_in_W"] and not eager["constant_in_batch_and_mini_batches"]
    assert eager["bytes_vs_minimum"] > 4
    assert not scaling.is_good({"zero2": eager})


def test_calls_that_grow_with_ranks_would_be_seen(rows: list[dict[str, Any]]) -> None:
    ddp = [row for row in rows if row["strategy"] == "ddp" and row["setting"] == "weak"]
    assert scaling.is_good(scaling.summarise(ddp))
    for name in ("exchange_calls", "reduction_calls"):
        more = [{**row, name: row[name] + row["world_size"]} for row in ddp]
        assert not scaling.is_good(scaling.summarise(more))


def test_the_tables_reckon_with_what_was_counted(rows: list[dict[str, Any]], model_path: str) -> None:
    module = Embedder(scaling.prepared_model(model_path, scaling.Case("any")), bf16=False)
    weights = scaling.weights_of(module)
    (of_fsdp2,) = [row for row in rows if row["strategy"] == "fsdp2"]
    passes = scaling_least.Passes(of_fsdp2["mini_batches"] // 2)
    gathered = scaling_least.reducing(4 * weights.gathered_by_fsdp2(passes, passes), 2)
    assert of_fsdp2["gathered_bytes"] == pytest.approx(gathered, rel=0.001)


def test_docs_hold_the_computed_tables() -> None:
    assert scaling_table.computed_tables() in DOCS.read_text(encoding="utf-8")
    elements, _ = scaling_table.model_2b()
    assert elements.of_page == 2_127_532_032


def test_a_node_alone_is_its_own_world() -> None:
    for cluster in scaling_table.CLUSTERS:
        for ranks, is_alone in ((8, True), (16, False)):
            _, _, talking = scaling_table.shares(64, ranks, cluster)
            assert (talking["fsdp2"] == talking["fsdp2, shard_within: node"]) == is_alone
