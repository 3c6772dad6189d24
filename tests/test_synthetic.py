"""Drawn pages: every query has one answer, and evaluation asks for combinations that training never showed."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farnear.errors import UserError
from farnear.ingest.page_drawing import CHARTS, COLOURS, LAYOUTS, TOPIC, YEAR, Page, draw_page
from farnear.ingest.synthetic import TEMPLATES, TOPICS, YEARS, query_for, synthesise

COMBINATIONS = len(CHARTS) * len(COLOURS) * len(TOPICS) * len(YEARS)


def contents(shards: list[Path]) -> list[tuple[str, bytes]]:
    """Query and image of each pair."""
    pairs: list[tuple[str, bytes]] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}
        keys = sorted({name.split(".")[0] for name in data})
        pairs += [(json.loads(data[f"{key}.json"])["query"], data[f"{key}.png"]) for key in keys]
    return pairs


def attributes(query: str) -> tuple[str, str, str, str]:
    kind, colour, topic = (
        next(value for value in values if re.search(rf"\b{value}\b", query)) for values in (CHARTS, COLOURS, TOPICS)
    )
    return kind, colour, topic, re.search(r"\d{4}", query).group()


def test_train_and_evaluation_share_values_but_no_combination(tmp_path: Path) -> None:
    train, evaluation = synthesise(tmp_path, train_pairs=150, eval_pairs=60, seed=0, pairs_per_shard=100)
    assert [path.name for path in train] == ["train-000000.tar", "train-000001.tar"]
    assert [path.name for path in evaluation] == ["eval-000000.tar"]
    on_train = [attributes(query) for query, _ in contents(train)]
    on_eval = [attributes(query) for query, _ in contents(evaluation)]
    assert len(set(on_train)) == 150 and len(set(on_eval)) == 60
    assert not set(on_train) & set(on_eval)
    for combinations in (on_train, on_eval):
        for values, all_values in zip(zip(*combinations, strict=True), (CHARTS, COLOURS, TOPICS, YEARS), strict=True):
            assert set(values) == set(map(str, all_values))


def test_equal_seeds_give_equal_shards_and_others_do_not(tmp_path: Path) -> None:
    first, again, other = (
        synthesise(tmp_path / name, train_pairs=8, eval_pairs=2, seed=seed)[0][0].read_bytes()
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert first != other


def test_pages_are_decodable_and_all_different(tmp_path: Path) -> None:
    train, evaluation = synthesise(tmp_path, train_pairs=40, eval_pairs=0, seed=0, size=(96, 112))
    assert evaluation == []
    images = [image for _, image in contents(train)]
    assert len(set(images)) == 40
    for image in images:
        page = Image.open(io.BytesIO(image))
        assert (page.size, page.mode) == ((96, 112), "RGB")


def test_the_space_of_combinations_is_large_enough_for_the_demo() -> None:
    assert COMBINATIONS >= 700


@pytest.mark.parametrize("kind", CHARTS)
@pytest.mark.parametrize("colour", COLOURS)
def test_colour_fills_a_good_area(kind: str, colour: str) -> None:
    for seed in range(4):
        pixels = np.asarray(draw_page(Page(kind, colour, "revenue", 2019, seed), (128, 160)), dtype=int)
        of_this_colour = (abs(pixels - COLOURS[colour]).sum(-1) < 30).mean()
        assert of_this_colour > 0.012
        others = [value for name, value in COLOURS.items() if name != colour]
        assert all((abs(pixels - other).sum(-1) < 30).mean() < 0.002 for other in others)


@pytest.mark.parametrize("topic", TOPICS)
def test_title_stays_on_the_page(topic: str) -> None:
    for seed in range(20):
        page = draw_page(Page("table", "red", topic, 2020, seed), (128, 160))
        edge = np.concatenate([np.asarray(page, dtype=int)[:, side] for side in (0, -1)])
        assert edge.min() > 200


def test_layout_and_data_differ_between_pages_of_one_combination() -> None:
    pages = {draw_page(Page("table", "green", "energy", 2017, seed), (128, 160)).tobytes() for seed in range(30)}
    assert len(pages) == 30
    assert len(LAYOUTS) >= 4


def test_every_wording_names_all_four_attributes() -> None:
    queries = {
        (colour, year): query_for(Page("pie chart", colour, "wages", year, 0)) for colour in COLOURS for year in YEARS
    }
    for (colour, year), query in queries.items():
        assert attributes(query) == ("pie chart", colour, "wages", str(year))
    wordings = {re.sub(rf"an? {colour}|{colour}|{year}", "", query) for (colour, year), query in queries.items()}
    assert len(wordings) == len(TEMPLATES)
    assert not any(" a orange" in query for query in queries.values())


def test_pages_of_one_combination_have_one_query() -> None:
    assert len({query_for(Page("table", "red", "costs", 2018, seed)) for seed in range(20)}) == 1


@pytest.mark.parametrize("siblings", [False, True])
def test_repeated_combinations_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siblings: bool) -> None:
    monkeypatch.setattr("farnear.ingest.synthetic.TOPICS", ("sales",))
    monkeypatch.setattr("farnear.ingest.synthetic.YEARS", (2019,))
    with pytest.warns(UserWarning, match="50 training pages show only 8 different combinations"):
        train, _ = synthesise(tmp_path, train_pairs=50, eval_pairs=4, seed=0, siblings=siblings)
    pairs = contents(train)
    assert len({attributes(query) for query, _ in pairs}) == 8
    assert len({image for _, image in pairs}) == 50


def test_siblings_differ_in_one_attribute_and_nowhere_else(tmp_path: Path) -> None:
    train, evaluation = synthesise(tmp_path, train_pairs=72, eval_pairs=48, seed=1, siblings=True)
    on_train = [attributes(query) for query, _ in contents(train)]
    assert len(set(on_train)) == 72
    page_of = {
        attributes(query): np.asarray(Image.open(io.BytesIO(image)), dtype=int) for query, image in contents(evaluation)
    }
    assert len(page_of) == 48 and not set(on_train) & page_of.keys()
    # Where kind, colour, topic and year show, in fractions of the height. A "p" hangs into the year.
    shows = ((YEAR[3], 1), (YEAR[3], 1), (0, YEAR[1] + 0.05), (TOPIC[3], YEAR[3]))
    for combination, page in page_of.items():
        found = set()
        for other, sibling in page_of.items():
            odd = [place for place in range(4) if combination[place] != other[place]]
            if len(odd) != 1:
                continue
            height = (np.flatnonzero((page != sibling).any(axis=(1, 2))) + 0.5) / len(page)
            if shows[odd[0]][0] < height[0] and height[-1] < shows[odd[0]][1]:
                found.add(odd[0])
        assert found == {0, 1, 2, 3}, combination


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"train_pairs": 0, "eval_pairs": 1}, "0 training and 1 evaluation pages cannot be drawn"),
        ({"train_pairs": 1, "eval_pairs": COMBINATIONS}, "evaluate on at most"),
        ({"train_pairs": 1, "eval_pairs": 1, "size": (128, 32)}, "128x32 pixels are too small"),
    ],
)
def test_impossible_numbers_are_refused(numbers: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        synthesise(tmp_path, seed=0, **numbers)
    assert list(tmp_path.iterdir()) == []


def test_old_shards_are_found_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "eval-000000.tar").touch()
    with pytest.raises(UserError, match=r"already holds 1 shard named eval-\*\.tar"):
        synthesise(tmp_path, train_pairs=1, eval_pairs=1, seed=0)
