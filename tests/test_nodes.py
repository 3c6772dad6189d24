"""Several machines: what each is told, refusals before anything starts, and a real run across two hosts.

A host is a network namespace of its own, joined to another by a cable that can be cut (veth). The two see one file
system, as machines of a cluster do. Making them takes root; where it is not allowed these tests are skipped.
"""

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from ranks import free_port
from test_slurm import losses, set_pace
from tiny_runs import make_inputs, run_tree

from farnear.config import RunConfig, parse_config
from farnear.errors import UserError
from farnear.launching import nodes as nodes_module
from farnear.launching.accelerate_config import check_config_file
from farnear.launching.hardware import Hardware
from farnear.launching.local import accelerate_command, ranks_of_machine
from farnear.launching.nodes import Nodes, interface_towards

ROOT = Path(__file__).resolve().parents[1]


def config(**keys: object) -> RunConfig:
    return parse_config({"output_dir": "run", "model": {"name_or_path": "m"}, "data": {"train": "a.tar"}, **keys})


# What a machine is told


def test_every_machine_has_its_own_number_in_the_same_command() -> None:
    two = [Nodes(2, rank, "10.0.0.1", 1234) for rank in range(2)]
    shown = [" ".join(accelerate_command("zero3", ["run.yaml"], None, 4, nodes)[0]) for nodes in two]
    assert shown[1] == shown[0].replace("--machine_rank 0", "--machine_rank 1")
    for words in (
        "--num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 1234",
        "--num_processes 4",
        "--deepspeed_multinode_launcher standard",
    ):
        assert words in shown[0]
    assert (
        accelerate_command("ddp", ["run.yaml"], None, None, Nodes())[0][2:]
        == accelerate_command("ddp", ["run.yaml"], None, None)[0][2:]
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((2, 2, "10.0.0.1"), "--machine_rank is 0 to 1 on 2 machines, another on each, not 2"),
        ((2, -1, "10.0.0.1"), "not -1"),
        ((2, 1, ""), "give each of them --main_process_ip"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place: tuple[int, int, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Nodes(*place)


def test_ranks_are_shared_out_evenly_and_have_a_gpu_each() -> None:
    eight, none = Hardware(("H100",) * 8, 64), Hardware((), 2)
    two = Nodes(2, 0, "10.0.0.1")
    assert ranks_of_machine(config(), two, eight) == 8
    assert ranks_of_machine(config(num_processes=4), two, eight) == 2
    assert ranks_of_machine(config(num_processes=4), Nodes(), none) == 4
    assert ranks_of_machine(config(strategy="single"), Nodes(), eight) == 1
    with pytest.raises(UserError, match="set a multiple of 2"):
        ranks_of_machine(config(num_processes=3), two, eight)
    with pytest.raises(UserError, match=r"9 ranks are asked for on a machine that shows 8 GPUs.*--num_processes 8"):
        ranks_of_machine(config(num_processes=9), Nodes(), eight)
    with pytest.raises(UserError, match="not one on each of 2 machines"):
        ranks_of_machine(config(strategy="single"), two, eight)


def test_gloo_is_given_the_interface_that_leads_to_machine_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_towards("127.0.0.1", 29500) == "lo"
    assert Nodes(2, 1, "127.0.0.1").environment({}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert Nodes(2, 1, "127.0.0.1").environment({"GLOO_SOCKET_IFNAME": "ib0"}) == {}
    assert Nodes().environment({}) == {}
    with pytest.raises(UserError, match=r"machine 0 cannot be found at no-such-host\.invalid"):
        interface_towards("no-such-host.invalid", 29500)
    monkeypatch.setattr(nodes_module.psutil, "net_if_addrs", dict)
    assert interface_towards("127.0.0.1", 29500) is None


def test_machines_wait_for_machine_0_and_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    monkeypatch.setattr(nodes_module, "SECONDS_OF_SILENCE", 0.0)
    monkeypatch.setattr(nodes_module, "SECONDS_TO_COME", 0.5)
    with pytest.raises(UserError, match=f"machine 0 did not come to 127.0.0.1:{port} within"):
        Nodes(2, 1, "127.0.0.1", port).meet()
    assert capsys.readouterr().out == f"waiting for machine 0 at 127.0.0.1:{port}\n"
    Nodes(2, 0, "127.0.0.1", port).meet()
    with socket.create_server(("127.0.0.1", port)):
        Nodes(2, 1, "127.0.0.1", port).meet()
        with pytest.raises(UserError, match=rf"port {port} of this machine cannot be used.*two machines are number 0"):
            Nodes(2, 0, "127.0.0.1", port).meet()
    Nodes().meet()


@pytest.mark.parametrize(
    ("text", "strategy", "message"),
    [
        ("distributed_type: MULTI_GPU", "ddp", None),
        ("distributed_type: DEEPSPEED", "zero2", None),
        ("distributed_type: MULTI_GPU", "zero2", "distributed_type: MULTI_GPU, but the run file strategy=zero2"),
        ("distributed_type: DEEPSPEED", "ddp", "distributed_type: DEEPSPEED, but the run file strategy=ddp"),
        ("distributed_type: MULTI_CPU", "ddp", "starts a single process unless mpirun"),
        ("distributed_type: FSDP", "fsdp2", "accelerate shard the model its own way"),
        ("use_cpu: true\ndistributed_type: MULTI_GPU", "ddp", "says use_cpu: true"),
        ("- 1", "ddp", "holds no keys; begin with a copy of accelerate_configs/ddp.yaml"),
        ("a: [", "ddp", "is not YAML"),
    ],
)
def test_an_accelerate_config_that_starts_something_else_is_refused(
    tmp_path: Path, text: str, strategy: str, message: str | None
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    if message is None:
        check_config_file(path, strategy)
        return
    with pytest.raises(UserError, match=message):
        check_config_file(path, strategy)


def test_every_shipped_config_starts_its_strategy() -> None:
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        check_config_file(path, "zero3" if path.stem == "zero3_offload" else path.stem.replace("cpu", "ddp"))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.0.0.1", ["10.0.0.1", "29500"]),
        ("n1:1234", ["n1", "1234"]),
        ("fe80::1", ["fe80::1", "29500"]),
        ("[fe80::1]:1234", ["fe80::1", "1234"]),
        ("[fe80::1]", ["fe80::1", "29500"]),
    ],
)
def test_node_sh_reads_an_address(tmp_path: Path, address: str, words: list[str]) -> None:
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "launch" / "node.sh"), "1", "2", address, "run.yaml", "a=b c", "--resume", "auto"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        *("-m", "farnear", "launch", "run.yaml", "a=b c", "--resume", "auto", "--num_machines", "2"),
        *("--machine_rank", "1", "--main_process_ip", words[0], "--main_process_port", words[1]),
    ]
    ended = subprocess.run(command[:-5], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")


# Two hosts


class Hosts:
    """Two network namespaces and the cable between them."""

    def __init__(self) -> None:
        name = uuid.uuid4().hex[:6]
        self.names = (f"fn{name}a", f"fn{name}b")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        for host in self.names:
            _ip("netns", "add", host)
        a, b = self.names
        _ip("link", "add", f"v{a}", "netns", a, "type", "veth", "peer", "name", f"v{b}", "netns", b)
        for host, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", f"v{host}")
        self.join()

    def join(self) -> None:
        for host in self.names:
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", f"v{host}", "up")

    def cut(self) -> None:
        _ip("-n", self.names[0], "link", "set", f"v{self.names[0]}", "down")

    def remove(self) -> None:
        for host in self.names:
            _ip("netns", "delete", host)

    def start(self, number: int, folder: Path) -> "subprocess.Popen[str]":
        """`launch/node.sh` on one of them."""
        words = [str(number), "2", self.addresses[0], "run.yaml", "--num_processes", "2", "--resume", "auto"]
        python = str(Path(sys.executable).parent)
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], "bash", str(ROOT / "launch" / "node.sh"), *words],
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{python}:{os.environ['PATH']}",
                "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        hosts = Hosts()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: two hosts. Needs root, iproute2 and network namespaces ({error})")
    yield hosts
    hosts.remove()


def test_a_run_across_two_hosts_ends_when_the_link_is_cut_and_goes_on_when_it_is_mended(
    tmp_path: Path, hosts: Hosts
) -> None:
    make_inputs(tmp_path)
    tree = run_tree(
        tmp_path,
        "run",
        strategy="ddp",
        loss={"function": "own_losses:paced", "matryoshka_dims": None},
        training={"max_steps": 60, "save_steps": 2, "ddp_timeout": 10},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    set_pace(tmp_path, 0.5)
    started = [hosts.start(number, tmp_path) for number in range(2)]
    try:
        latest = tmp_path / "run" / "latest"
        deadline = time.monotonic() + 200
        while not latest.exists():
            assert time.monotonic() < deadline and all(side.poll() is None for side in started)
            time.sleep(0.1)
        hosts.cut()
        cut_at = time.monotonic()
        texts = [side.communicate(timeout=60)[0] for side in started]
        assert time.monotonic() - cut_at < 40
    finally:
        for side in started:
            side.kill()
            side.wait()
    assert [side.returncode for side in started] == [1, 1]
    for text in texts:
        assert "no rank has made progress" in text or "has lost another rank" in text, text
        assert "--resume" in text and "continue" in text
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)

    hosts.join()
    set_pace(tmp_path, 0.0)
    again = [hosts.start(number, tmp_path) for number in range(2)]
    try:
        texts = [side.communicate(timeout=200)[0] for side in again]
    finally:
        for side in again:
            with suppress(ProcessLookupError):
                side.kill()
            side.wait()
    assert [side.returncode for side in again] == [0, 0], texts
    assert "continuing from step-" in texts[0]
    assert len(losses(tmp_path / "run")) == 60
