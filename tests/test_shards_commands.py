"""`farnear shards index`, `inspect` and `verify`, and what stands behind them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tar_makers import image_bytes, pair_members, write_pairs, write_tar

from farnear.cli import main
from farnear.data.run_shards import read_exclusions

REFERENCES = [
    {"query": "a", "pos_id": "p0", "neg_ids": ["p1"]},
    {"query": "b", "pos_ids": ["p0", "p1"]},
    {"query": "c", "pos_id": "p2"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARNEAR_CACHE", str(tmp_path / "cache"))


def corpus_and_pairs(folder: Path, pages: list[bytes]) -> tuple[Path, Path]:
    corpus = write_tar(folder / "corpus.tar", [(f"p{number}.png", page) for number, page in enumerate(pages)])
    records = [(f"k{number}.json", json.dumps(record).encode()) for number, record in enumerate(REFERENCES)]
    return corpus, write_tar(folder / "pairs.tar", records)


def change_in_place(shard: Path, before: bytes, after: bytes) -> None:
    """As a failing disk does: the time of the last change stays what it was."""
    assert len(before) == len(after) and shard.read_bytes().count(before) == 1
    status = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(before, after))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_verify_finds_what_breaks_off_and_what_changed_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [image_bytes(0), image_bytes(1), image_bytes(2)[:50]]
    corpus, pairs = corpus_and_pairs(tmp_path, pages)
    words = ["shards", "verify", str(pairs), "--corpus", str(corpus)]
    assert main(words) == 2
    told = capsys.readouterr()
    assert [line.split()[2] for line in told.out.splitlines()[2:]] == ["undecodable"]
    assert "'p2.png': image file is truncated" in told.out
    assert told.err.startswith("farnear: error: 1 fault cost at least 1 pair;") and told.err.count("\n") == 1
    change_in_place(corpus, pages[0][-20:-8], bytes(12))
    assert main(words) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4:2] for line in lines[2:]] == [["corpus.tar", "changed"], ["corpus.tar", "undecodable"]]
    # k0 and k1 name the first page, k2 the last one.
    assert [line.split()[3] for line in lines[2:]] == ["2", "1"]
    exclude = tmp_path / "exclude.jsonl"
    assert main([*words, "--write-exclude", str(exclude)]) == 2
    told = capsys.readouterr()
    assert "--write-exclude" not in told.err and f"3 pairs for data.exclude in {exclude}" in told.out
    # The list may be the one that a run file names.
    assert main([*words, "--write-exclude", str(exclude)]) == 2
    assert "exists and is not replaced" in capsys.readouterr().err
    assert list(read_exclusions([str(exclude)])) == [(str(pairs), key) for key in ("k0", "k1", "k2")]


def test_whole_shards_pass_and_are_scanned_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "data", 10, 2)
    pattern = str(tmp_path / "data" / "*.tar")
    assert main(["shards", "verify", pattern]) == 0
    assert capsys.readouterr().out == "shards: 2 shards, 0.0 MB, 10 pairs, 0 faults\n"
    scans = sorted((tmp_path / "cache" / "scans").iterdir())
    times = [scan.stat().st_mtime_ns for scan in scans]
    assert main(["shards", "index", pattern]) == 0
    assert [scan.stat().st_mtime_ns for scan in sorted((tmp_path / "cache" / "scans").iterdir())] == times
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("kept in "))
    assert path.is_file() and path.is_relative_to(tmp_path / "cache")
    assert main(["shards", "index", pattern, "--cache-dir", str(tmp_path / "other")]) == 0
    assert len(list((tmp_path / "other" / "scans").iterdir())) == 2


def test_index_shows_a_table_of_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [*pair_members("a", "q", 1), ("b.png", image_bytes(2)), *pair_members("c", "r", 3)]
    shard = write_tar(tmp_path / "a.tar", members)
    assert main(["shards", "index", str(shard)]) == 0
    out = capsys.readouterr().out
    assert "2 pairs in 1 shard, 1 fault, at least 1 pair lost" in out
    assert out.splitlines()[1].split() == ["shard", "offset", "kind", "pairs", "lost", "detail"]
    assert out.splitlines()[2].split()[:4] == ["a.tar", "2560", "incomplete", "1"]


def test_a_run_file_names_shards_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "train", 6, 2)
    write_pairs(tmp_path / "eval", 3, 1)
    tree = {
        "output_dir": "unused",
        "model": {"name_or_path": "some/model"},
        "data": {
            "train": str(tmp_path / "train" / "*.tar"),
            "eval": str(tmp_path / "eval" / "*.tar"),
            "cache_dir": str(tmp_path / "of the run"),
        },
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    assert main(["shards", "index", str(run_file)]) == 0
    out = capsys.readouterr().out
    assert "training: 6 pairs" in out and "evaluation: 3 pairs" in out
    assert len(list((tmp_path / "of the run" / "indexes").iterdir())) == 2
    assert main(["shards", "index", str(run_file), "--corpus", "x.tar"]) == 2
    assert "--corpus goes with shards" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["index", "inspect", "verify"])
def test_user_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8bcompressed")
    (tmp_path / "file").touch()
    for words, message in (
        ([str(tmp_path / "none-*.tar")], "matches no file"),
        ([], "no shard is named"),
        ([str(tmp_path / "a.tar")], "is compressed with gzip"),
        ([str(tmp_path / "a.tar"), "--cache-dir", str(tmp_path / "file")], "cannot be written"),
    ):
        assert main(["shards", command, *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_inspect_tells_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, pairs = corpus_and_pairs(tmp_path, [image_bytes(0), image_bytes(1), image_bytes(1)])
    assert main(["shards", "inspect", str(pairs), "--corpus", str(corpus)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shards" and lines[1].split() == ["pairs", "3"]
    assert any(line.startswith("repeated pages") for line in lines) and any(
        "corpus.tar/p0.png" in line for line in lines
    )
    assert main(["shards", "inspect", "--corpus", str(corpus)]) == 0
    assert "3 image" in capsys.readouterr().out


def test_a_run_file_takes_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = write_pairs(tmp_path / "data", 3, 1)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({"output_dir": "x", "model": {"name_or_path": "y"}, "data": {"train": "z.tar"}}))
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text(json.dumps({"shard": shard.name, "key": "k00001"}) + "\n")
    words = [str(run_file), f"data.train={shard}", f"data.exclude={exclude}", "data.eval="]
    assert main(["shards", "inspect", *words]) == 0
    assert "1 pair by data.exclude" in capsys.readouterr().out


def test_whoever_reads_may_stop_reading(tmp_path: Path) -> None:
    (shard,) = write_pairs(tmp_path / "data", 3, 1)
    program = "import sys; from farnear.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, "shards", "inspect", str(shard)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.close()
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (141, "")


@pytest.mark.timeout(60)
def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += f"import farnear.data.shard_store as store\nopen({str(tmp_path / 'ready')!r}, 'w').close()\n"
    program += "import time; store.ShardStore.facts = lambda self, shard: time.sleep(60)\n"
    program += "from farnear.cli import main; sys.exit(main(sys.argv[1:]))"
    (shard,) = write_pairs(tmp_path / "data", 3, 1)
    words = [sys.executable, "-c", program, "shards", "index", str(shard)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (130, "farnear: stopped by SIGINT\n")
