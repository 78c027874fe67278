"""N processes in N network namespaces of Linux, joined by links of a given rate, all of it gone with this process.

The namespaces have no names: each lives as long as its process, and the kernel kills the processes when this one ends,
however it ends. All links meet in one more namespace, the hub, in a bridge, or with nodes in a bridge per node whose
uplinks meet in a bridge of bridges. tc's token bucket shapes both directions of every link, at both of its ends.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

__all__ = [
    *("INSIDE", "INTERFACE", "Namespaces", "ask", "check_start", "interface_bytes", "is_inside", "parse_rate"),
    *("unusable_reason"),
]

INSIDE = "TRITONMOE_INSIDE_NAMESPACES"
"""The environment variable that every process in the namespaces has; torchrun's RANK alone says nothing of its link."""

CONTROL = "TRITONMOE_NAMESPACES_CONTROL"
"""The environment variable that holds the number of the open socket over which rank 0 asks."""
INTERFACE = "eth0"
"""What the end of a rank's link is called in its namespace."""


def is_inside() -> bool:
    """Return whether this process was started in a network namespace of its own."""
    return INSIDE in os.environ


def check_start(netns: int | None, link_options: Mapping[str, object]) -> None:
    """Refuse --netns under torchrun, and there what is said of a link that nothing shapes.

    link_options: by option what was given for it, or None.
    Raises:
        ValueError: the option that would have no effect, and the way out.
    """
    if "RANK" not in os.environ or is_inside():
        return
    if netns is not None:
        raise ValueError(
            f"--netns {netns} starts processes of its own, and the environment has RANK={os.environ['RANK']}, as under "
            "torchrun: start it without torchrun (unset RANK), or leave out --netns to measure torchrun's ranks"
        )
    for option, given in link_options.items():
        if given is not None:
            raise ValueError(
                f"{option} shapes the links that --netns makes, and can't shape the link between ranks of torchrun. "
                "Leave the option out, or start with --netns N and without torchrun"
            )


def ask(question: str) -> str | None:
    """Ask, on rank 0, the process that made the namespaces; None where there is none."""
    number = os.environ.get(CONTROL)
    if number is None:
        return None
    control = socket.socket(fileno=int(number))
    try:
        control.sendall(question.encode() + b"\n")
        return control.recv(4096).decode().strip()
    finally:
        control.detach()


def interface_bytes() -> tuple[int, int]:
    """Return the bytes that the interface of this process's own namespace has received and sent, by its counters."""
    # Not /sys: it shows the namespace in which it was mounted.
    with open("/proc/self/net/dev") as file:
        for line in file:
            name, _, counters = line.partition(":")
            if name.strip() == INTERFACE:
                fields = counters.split()
                return int(fields[0]), int(fields[8])
    raise ValueError(f"this process's network namespace has no interface {INTERFACE}")


UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_rate(text: str) -> float:
    """Return bits per second of a rate as tc writes it: "1gbit" gives 1e9.

    Raises:
        ValueError: the text is not a positive number with one of the units bit, kbit, mbit, gbit.
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        rate = float(number) * UNITS[text[len(number) :]]
    except (ValueError, KeyError):
        rate = 0.0
    if not 0 < rate < 1e15:
        raise ValueError(f"a rate is a positive number with bit, kbit, mbit or gbit, as in 1gbit, got {text!r}")
    return rate


def address(rank: int) -> str:
    """Return the address of a rank's end of its link."""
    return f"10.77.{rank // 200}.{rank % 200 + 1}"


def bucket(rate: float) -> str:
    """Return tc's token bucket; a burst of 1 ms, and a queue that is long enough to lose nothing."""
    burst = max(128 * 1024, int(rate / 8 * 1e-3))
    return f"tbf rate {int(rate)}bit burst {burst} limit {max(8 << 20, int(rate / 8 * 0.5))}"


def shaping(rate: float, slow: Mapping[int, float]) -> list[str]:
    """Return the commands that shape what a rank sends: all of it, and within that what goes to some ranks."""
    device = f"dev {INTERFACE}"
    if not slow:
        return [f"tc qdisc replace {device} root {bucket(rate)}"]
    commands = [
        f"tc qdisc del {device} root",
        f"tc qdisc add {device} root handle 1: htb default 10",
        f"tc class add {device} parent 1: classid 1:1 htb rate {int(rate)}bit",
        f"tc class add {device} parent 1:1 classid 1:10 htb rate {int(rate)}bit",
    ]
    for receiver, bits in slow.items():
        commands += [
            f"tc class add {device} parent 1:1 classid 1:{20 + receiver} htb rate {int(bits)}bit",
            f"tc filter add {device} parent 1: protocol ip prio 1 u32 match ip dst {address(receiver)}/32 "
            f"flowid 1:{20 + receiver}",
        ]
    return commands


CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
PR_SET_PDEATHSIG = 1
COMMANDS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux"}
MTU = 9000
"""Headers are then less than 1 % of the bytes on the wire."""


def unusable_reason() -> str | None:
    """Return why network namespaces can't be made here; None where they can."""
    if not hasattr(os, "geteuid"):
        return "network namespaces are a feature of Linux"
    if os.geteuid() != 0:
        return "making network namespaces needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)"
    missing = {command: package for command, package in COMMANDS.items() if shutil.which(command) is None}
    if missing:
        return ", ".join(f"the command {c} is missing (package {package})" for c, package in missing.items())
    tried = subprocess.run(
        ["unshare", "--net", "sh", "-ec", "ip link add try0 type veth peer name try1; ip link add try2 type bridge; "
         "tc qdisc add dev try0 root tbf rate 1gbit burst 256kb latency 50ms"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if tried.returncode:
        return f"this kernel or container allows no namespaces, veth, bridge or tbf: {tried.stderr.strip()}"
    return None


class Namespaces:
    """The processes and their links, as a context manager; leaving it ends them all.

    Args:
        command: what each process runs (it must leave no children of its own), with RANK, WORLD_SIZE, MASTER_ADDR and
            so on in its environment, as under torchrun, and with one core of its own where there are enough.
        num_ranks: N.
        rate: bits per second of every rank's link, in each direction.
        node_size: ranks per node, which share an uplink and a host's name; None: all ranks meet in one bridge.
        inter_rate: bits per second of such an uplink; None is the rate of a link.
    Raises:
        OSError: this machine or user can't make namespaces; the message says what is missing.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_ranks: int,
        rate: float,
        *,
        node_size: int | None = None,
        inter_rate: float | None = None,
    ) -> None:
        reason = unusable_reason()
        if reason is not None:
            raise OSError(f"network namespaces can't be used here: {reason}")
        self._command = list(command)
        self.num_ranks = num_ranks
        self.rate, self.inter_rate = rate, rate if inter_rate is None else inter_rate
        self.node_size = num_ranks if node_size is None else node_size
        self.num_nodes = num_ranks // self.node_size
        self._processes: list[subprocess.Popen] = []
        self._hub: subprocess.Popen | None = None
        self._stack = ExitStack()
        self._control, self._control_of_rank = socket.socketpair()

    def __enter__(self) -> "Namespaces":
        self._stack.callback(self._end)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, timeout_s: float) -> int:
        """Wait for all processes, answering what rank 0 asks; give the first exit status that is not 0.

        When a process fails, the others have timeout_s to end by themselves.
        """
        deadline: float | None = None
        asking = [self._control]
        while any(process.poll() is None for process in self._processes):
            readable, _, _ = select.select(asking, [], [], 0.05)
            if readable:
                question = self._control.recv(4096).decode().strip()
                if question:
                    self._control.sendall(self._answer(question).encode() + b"\n")
                else:
                    asking = []  # rank 0 has ended
            failed = [process for process in self._processes if process.poll()]
            if failed and deadline is None:
                deadline = time.monotonic() + timeout_s
            if deadline is not None and time.monotonic() > deadline:
                break
        return next((process.returncode for process in self._processes if process.returncode), 0)

    def _answer(self, question: str) -> str:
        """Answer a question of rank 0's ask(): "rate BITS_PER_S", of every rank's link or of the nodes' uplinks with
        "uplink_rate BITS_PER_S", "rates JSON", or "uplinks" for uplink_bytes() as JSON.

        The JSON of rates is [[bits per second of every rank], [[sender, receiver, bits per second], ...]].
        """
        word, _, rest = question.partition(" ")
        if word == "rate":
            self.set_rate(float(rest))
            return "done"
        if word == "uplink_rate":
            self.set_uplink_rate(float(rest))
            return "done"
        if word == "rates":
            of_ranks, of_links = json.loads(rest)
            self.set_rates(of_ranks, {(sender, receiver): rate for sender, receiver, rate in of_links})
            return "done"
        assert word == "uplinks", question
        return json.dumps(self.uplink_bytes())

    def set_rate(self, rate: float) -> None:
        """Return all ranks' links another rate; what is under way goes on."""
        self.rate = rate
        self._in_hub([f"tc qdisc replace dev r{rank} root {bucket(rate)}" for rank in range(self.num_ranks)])
        for process in self._processes:
            _run_in(process.pid, [f"tc qdisc replace dev {INTERFACE} root {bucket(rate)}"])

    def set_uplink_rate(self, rate: float) -> None:
        """Return the uplinks of all nodes another rate, in both directions."""
        self.inter_rate = rate
        ends = [f"{end}{node}" for node in range(self.num_nodes) for end in ("up", "down")]
        self._in_hub([f"tc qdisc replace dev {end} root {bucket(rate)}" for end in ends])

    def set_rates(self, of_ranks: Sequence[float], of_links: Mapping[tuple[int, int], float]) -> None:
        """Return every rank's link a rate of its own, and what it sends to some ranks a lower one within that."""
        self._in_hub([f"tc qdisc replace dev r{rank} root {bucket(rate)}" for rank, rate in enumerate(of_ranks)])
        for sender, process in enumerate(self._processes):
            slow = {receiver: rate for (of, receiver), rate in of_links.items() if of == sender}
            _run_in(process.pid, shaping(of_ranks[sender], slow))

    def uplink_bytes(self) -> list[int]:
        """Return the bytes that every node has sent to other nodes, by its uplink's counters."""
        if self.num_nodes == 1:
            return []
        lines = self._in_hub(["cat /proc/self/net/dev"]).splitlines()
        sent = {line.partition(":")[0].strip(): int(line.partition(":")[2].split()[8]) for line in lines if ":" in line}
        return [sent[f"up{node}"] for node in range(self.num_nodes)]

    def _start(self) -> None:
        self._hub = self._spawn(["sleep", "infinity"], {}, None)
        cores = sorted(os.sched_getaffinity(0))
        for rank in range(self.num_ranks):
            environment = {
                INSIDE: "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.num_ranks),
                "MASTER_ADDR": address(0),
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "OMP_NUM_THREADS": "1",
            }
            if rank == 0:
                environment[CONTROL] = str(self._control_of_rank.fileno())
            # It must not look for its interface before that is there.
            command = ["sh", "-c", 'read -r line && exec "$@"', "sh", *self._command]
            core = cores[rank % len(cores)]
            host = f"node-{rank // self.node_size}" if self.num_nodes > 1 else ""
            self._processes.append(self._spawn(command, environment, core, is_first=rank == 0, host=host))
        self._control_of_rank.close()
        self._link()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()

    def _spawn(
        self,
        command: list[str],
        environment: dict[str, str],
        core: int | None,
        is_first: bool = False,
        host: str = "",
    ) -> subprocess.Popen:
        libc = ctypes.CDLL(None, use_errno=True)
        parent = os.getpid()

        def before_exec() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before the line above
                os._exit(1)
            if libc.unshare(CLONE_NEWNET | CLONE_NEWUTS):
                raise OSError(ctypes.get_errno(), "unshare")
            if host:
                socket.sethostname(host)
            if core is not None:
                os.sched_setaffinity(0, {core})

        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            preexec_fn=before_exec,
            pass_fds=[self._control_of_rank.fileno()] if is_first else [],
        )

    def _link(self) -> None:
        of_rank = bucket(self.rate)
        commands = ["ip link set lo up"]
        commands += [f"ip link add br{node} type bridge" for node in range(self.num_nodes)]
        for rank, process in enumerate(self._processes):
            commands += [
                f"ip link add r{rank} mtu {MTU} type veth peer name {INTERFACE} mtu {MTU} netns {process.pid}",
                f"ip link set r{rank} master br{rank // self.node_size} up",
                f"tc qdisc add dev r{rank} root {of_rank}",
            ]
        if self.num_nodes > 1:
            commands += ["ip link add core type bridge", "ip link set core up"]
            for node in range(self.num_nodes):
                commands += [f"ip link add up{node} mtu {MTU} type veth peer name down{node} mtu {MTU}"]
                for end, bridge in ((f"up{node}", f"br{node}"), (f"down{node}", "core")):
                    commands += [
                        f"ip link set {end} master {bridge} up",
                        f"tc qdisc add dev {end} root {bucket(self.inter_rate)}",
                    ]
        commands += [f"ip link set br{node} up" for node in range(self.num_nodes)]
        self._in_hub(commands)
        for rank, process in enumerate(self._processes):
            _run_in(
                process.pid,
                [
                    "ip link set lo up",
                    f"ip addr add {address(rank)}/16 dev {INTERFACE}",
                    f"ip link set {INTERFACE} up",
                    f"tc qdisc add dev {INTERFACE} root {of_rank}",
                ],
            )

    def _in_hub(self, commands: list[str]) -> str:
        """Run commands in the hub's network namespace, and give what they print."""
        assert self._hub is not None
        return _run_in(self._hub.pid, commands)

    def _end(self) -> None:
        everybody = [*self._processes, *([self._hub] if self._hub else [])]
        for process in everybody:
            process.kill()
        for process in everybody:
            process.wait()
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
        self._control.close()
        self._control_of_rank.close()


def _run_in(pid: int, commands: Sequence[str]) -> str:
    """Run commands in the network namespace of a process."""
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", "sh", "-ec", "\n".join(commands)], capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(f"setting up the namespaces' links failed: {done.stderr.strip()}")
    return done.stdout
