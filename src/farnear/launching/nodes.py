"""One machine among several: what each is told about the others, and over which network its ranks talk.

Every machine runs the same command with its own ``machine_rank``; machine 0 is the one at ``main_process_ip``, where
all ranks meet. torchrun finds the machines statically: no service, no election, each knows its number. The names are
accelerate's.

Gloo carries the ranks' agreements on any cluster, and on CPUs the gradients too. Left alone it listens at whatever
address the machine's own name stands for, which on many systems is a loopback address that no other machine reaches.
So it is given the interface from which the packets to machine 0 leave. NCCL looks for interfaces itself.
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from farnear.errors import UserError

DEFAULT_PORT = 29500
"""torchrun's and accelerate's own."""

SECONDS_TO_COME = 600.0
"""That machines wait for machine 0, as torchrun does, who does not say so."""

SECONDS_OF_SILENCE = 10.0


@dataclass(frozen=True)
class Nodes:
    """A machine's place.

    Attributes:
        num_machines: How many there are.
        machine_rank: Which one this is.
        main_process_ip: Address or name of machine 0.
        main_process_port: A port that is free there, the same on all machines.
    """

    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str = ""
    main_process_port: int = DEFAULT_PORT

    def __post_init__(self) -> None:
        if self.num_machines == 1:
            return
        if not 0 <= self.machine_rank < self.num_machines:
            raise UserError(
                f"--machine_rank is 0 to {self.num_machines - 1} on {self.num_machines} machines, another on each, not "
                f"{self.machine_rank}"
            )
        if not self.main_process_ip:
            raise UserError(
                f"{self.num_machines} machines have to meet somewhere; give each of them --main_process_ip, the "
                "address of machine 0"
            )

    def words(self) -> list[str]:
        """Options of ``accelerate launch``; none where there is one machine.

        That machines find each other statically and are not replaced, so that a rank's failure is everyone's end, are
        its defaults, and no config can say otherwise.
        """
        if self.num_machines == 1:
            return []
        return [
            *("--num_machines", str(self.num_machines), "--machine_rank", str(self.machine_rank)),
            *("--main_process_ip", self.main_process_ip, "--main_process_port", str(self.main_process_port)),
        ]

    def meet(self) -> None:
        """Wait until machine 0 is there, where this is another one; or see to it that the others can come.

        Raises:
            UserError: Machine 0 did not come, or its port is taken.
        """
        if self.num_machines == 1:
            return
        where = (self.main_process_ip, self.main_process_port)
        if self.machine_rank == 0:
            self._refuse_taken_port()
            return
        begun = time.monotonic()
        told = False
        while not _answers(where):
            waited = time.monotonic() - begun
            if waited > SECONDS_TO_COME:
                raise UserError(
                    f"machine 0 did not come to {self.main_process_ip}:{self.main_process_port} within "
                    f"{SECONDS_TO_COME:.0f} s; start it, and check --main_process_ip and that no firewall is between"
                )
            if waited > SECONDS_OF_SILENCE and not told:
                print(f"waiting for machine 0 at {self.main_process_ip}:{self.main_process_port}", flush=True)
                told = True
            time.sleep(1.0)

    def _refuse_taken_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.main_process_ip else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", self.main_process_port))
            except OSError as error:
                raise UserError(
                    f"port {self.main_process_port} of this machine cannot be used ({error.strerror}): another run is "
                    "there, or two machines are number 0; give all machines another --main_process_port"
                ) from None

    def environment(self, given: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Variables for the ranks, beside those that the user has set.

        Raises:
            UserError: Machine 0 cannot be found.
        """
        if self.num_machines == 1 or "GLOO_SOCKET_IFNAME" in given:
            return {}
        interface = interface_towards(self.main_process_ip, self.main_process_port)
        return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def _answers(where: tuple[str, int]) -> bool:
    try:
        socket.create_connection(where, timeout=5.0).close()
    except OSError:
        return False
    return True


def interface_towards(host: str, port: int) -> str | None:
    """The network interface from which packets to a machine leave; None where that cannot be told.

    Raises:
        UserError: The name means nothing here, or no network leads there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel only looks up the route
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"machine 0 cannot be found at {host} ({error.strerror or error}), so the ranks could not meet; check "
            "--main_process_ip"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name
    return None
