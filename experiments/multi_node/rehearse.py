"""Two machines, rehearsed on one: two network namespaces with a cable between them, a node of one process in each.

    python experiments/multi_node/rehearse.py                                  # root only; minutes on two cores
    python experiments/multi_node/rehearse.py --launchers static --disks shared

Every launcher trains experiment=smoke under ZeRO-2 and is compared with two processes on one machine. Then it trains
again, node 1 alone gets SIGTERM, and the repeated command goes on. The nodes see one disk, or each its own at the same
path. README.md has what came of it. Exit status 1 if anything differs; the namespaces are removed in any case.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xpo.tracking.metrics_log import read_metrics
from xpo.tracking.runs import RunRecord

ADDRESSES = ("10.201.77.1", "10.201.77.2")
PORT = "29511"
TRAIN = ("xpo.train", "experiment=smoke", "deepspeed=zero2", "training.use_cpu=true", "tracking=none")
KEYS = ("training.max_steps=6", "training.save_steps=100", "hydra.run.dir=run")
TOLERANCE = 1e-5
WAIT_S = 240.0  # for the end of a run of seconds
NOT_COMPARED = ("perf/", "eval_runtime", "eval_samples", "eval_steps", "train_", "total_flos")  # clocks
LAUNCHERS = ("static", "c10d", "accelerate", "deepspeed")
# The launcher's part only: deepspeed=zero2 says how to train, and its configuration is the one in force. With
# distributed_type: MULTI_CPU, or --cpu, each node would train alone; with mixed_precision here, Accelerate refuses.
ACCELERATE = """distributed_type: DEEPSPEED
deepspeed_config: {deepspeed_multinode_launcher: standard, deepspeed_config_file: zero.json}
"""
ACCELERATE_ZERO = '{"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}'
# Beside ordinary checkpoints, each node needs what rank 0 alone would write.
OWN_DISK = ("+training.kwargs.save_on_each_node=true",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    parser.add_argument("--disks", nargs="+", choices=("shared", "own"), default=("shared", "own"))
    parser.add_argument("--without-stop", action="store_true", help="no SIGTERM, no resuming")
    parser.add_argument("--keep", type=Path, help="a directory for what the nodes wrote and said, new or empty")
    args = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print("skipped: network namespaces need root and the command ip (iproute2)")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces go then, too
    with tempfile.TemporaryDirectory() as scratch, network() as names:
        rehearsal = Rehearsal(args.keep or Path(scratch), names)
        print(f"{'launcher':<12}{'disks':<8}{'difference':>11}  {'node 1 told to stop':<24}{'difference, resumed':>19}")
        fine = [rehearsal.row(*case, args.without_stop) for case in cases(args.launchers, args.disks)]
    sys.exit(0 if all(fine) else 1)


def cases(launchers: Sequence[str], disks: Sequence[str]) -> list[tuple[str, str]]:
    return [(launcher, disk) for launcher in launchers for disk in disks]


@contextmanager
def network() -> Iterator[tuple[str, str]]:
    """Two namespaces, joined; their names."""
    names = (f"xpo{os.getpid()}a", f"xpo{os.getpid()}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [("veth0", "netns", names[0]), ("veth0", "netns", names[1])]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            end(name)
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def processes(name: str) -> list[int]:
    """Those in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def end(name: str) -> None:
    """Ends at once what is left in a namespace: torchrun's workers have sessions of their own."""
    for number in processes(name):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def launch_words(launcher: str, node: int) -> list[str]:
    """What starts the process of a node."""
    python = [sys.executable, "-m"]
    if launcher == "accelerate":
        multi = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(node)]
        multi += ["--main_process_ip", ADDRESSES[0], "--main_process_port", PORT, "--mixed_precision", "no"]
        return [*python, "accelerate.commands.launch", "--config_file", "accelerate.yaml", *multi, "-m"]
    if launcher == "deepspeed":
        hosts = ["--hostfile", "hostfile", "--master_addr", ADDRESSES[0], "--master_port", PORT]
        return [
            *python,
            *("deepspeed.launcher.runner", *hosts, "--no_ssh", "--node_rank", str(node)),
            *("--no_local_rank", "--module"),
        ]
    words = [*python, "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--shutdown_timeout", "120"]
    if launcher == "static":
        return [*words, "--node_rank", str(node), "--master_addr", ADDRESSES[0], "--master_port", PORT, "-m"]
    # The names of both machines are the same here, so each is told its address and whether it is the host.
    words += ["--rdzv_backend", "c10d", "--rdzv_id", "rehearsal", "--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}"]
    return [*words, "--rdzv_conf", f"is_host={str(node == 0).lower()}", "--local_addr", ADDRESSES[node], "-m"]


class Rehearsal:
    """Runs and compares.

    Args:
        root: a directory for everything.
        names: of the namespaces.
    """

    def __init__(self, root: Path, names: tuple[str, str]):
        self.root = root.absolute()
        self.names = names
        self.work = self.root / "work"  # where each node sees its disk
        self.work.mkdir(parents=True)
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "veth0",
            "XPO_STORES": str(self.work / "stores"),
        }
        alone = self.root / "one_machine"
        alone.mkdir()
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        environment = self.environment | {"GLOO_SOCKET_IFNAME": "lo", "XPO_STORES": str(alone / "stores")}
        with (alone / "output.log").open("w") as log:
            subprocess.run(
                [*words, *TRAIN, *KEYS], cwd=alone, env=environment, stdout=log, stderr=log, check=True, timeout=WAIT_S
            )
        self.expected = metrics(alone)

    def row(self, launcher: str, disk: str, without_stop: bool) -> bool:
        """Prints a line of the table; whether all is as it should be."""
        print(f"{launcher:<12}{disk:<8}", end="", flush=True)
        try:
            done = self.run(f"{launcher}_{disk}", launcher, disk)
            differences = [difference(self.expected, metrics(done[0]))]
            print(f"{differences[0]:>11.1e}", end="", flush=True)
            if not without_stop:
                disks = self.run(f"{launcher}_{disk}_stopped", launcher, disk, stop=True)
                print(f"  {stopped_after(disks):<24}", end="", flush=True)
                self.run(f"{launcher}_{disk}_stopped", launcher, disk, keys=("training.resume=auto",))
                differences.append(difference(self.expected, metrics(disks[0])))
                print(f"{differences[1]:>19.1e}", end="")
            print()
        except RuntimeError as error:
            print(f"  {error}")
            return False
        return max(differences) <= TOLERANCE

    def run(
        self, name: str, launcher: str, disk: str, keys: tuple[str, ...] = (), stop: bool = False
    ) -> tuple[Path, Path]:
        """One run on both nodes to its end; their disks.

        Args:
            stop: SIGTERM to the launcher of node 1 as soon as training has begun.

        Raises:
            RuntimeError: it failed, or if told to stop it did not.
        """
        first = self.root / name
        disks = (first, first if disk == "shared" else self.root / f"{name}_node1")
        for directory in disks:
            directory.mkdir(exist_ok=True)
            (directory / "accelerate.yaml").write_text(ACCELERATE)
            (directory / "zero.json").write_text(ACCELERATE_ZERO)
            (directory / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        keys += OWN_DISK if disk == "own" else ()
        nodes: list[subprocess.Popen[bytes]] = []
        try:
            for node in (0, 1):
                words = [*launch_words(launcher, node), *TRAIN, *KEYS, *keys]
                nodes.append(self.start(node, disks[node], words))
            if stop:
                wait(lambda: (first / "run" / "completions" / "step_000000.json").exists(), nodes)
                # As a scheduler does: of deepspeed's processes, the outermost passes no signal on.
                os.killpg(nodes[1].pid, signal.SIGTERM)
            wait(lambda: all(node.poll() is not None for node in nodes) and not any(map(processes, self.names)))
        finally:
            for name in self.names:
                end(name)
        statuses = [node.returncode for node in nodes]
        if (0 in statuses) if stop else any(statuses):
            raise RuntimeError(f"exit statuses {statuses}; {last_error(disks)}")
        return disks

    def start(self, node: int, disk: Path, words: list[str]) -> subprocess.Popen[bytes]:
        """A process in the network namespace, which comes with a mount namespace: `disk` is at `work` there."""
        script = f'mount --bind "$1" "$2" && cd "$2" && shift 2 && exec "$@" >> output_{node}.log 2>&1'
        inside = ["ip", "netns", "exec", self.names[node], "sh", "-c", script, "sh", str(disk), str(self.work)]
        return subprocess.Popen([*inside, *words], env=self.environment, start_new_session=True)


def wait(condition: Any, nodes: Sequence[subprocess.Popen[bytes]] = ()) -> None:
    """Until the condition holds or one of the nodes has ended.

    Raises:
        RuntimeError: it takes too long.
    """
    deadline = time.monotonic() + WAIT_S
    while not condition() and all(node.poll() is None for node in nodes):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not done after {WAIT_S:g} seconds")
        time.sleep(0.1)


def metrics(disk: Path) -> list[dict[str, float]]:
    """What the run logged, without clocks."""
    history = read_metrics(disk / "run")
    entries = [{name: value for name, value in entry.items() if not name.startswith(NOT_COMPARED)} for entry in history]
    return [entry for entry in entries if entry.keys() - {"step", "epoch"}]


def difference(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    """The largest of any metric of any log.

    Raises:
        RuntimeError: not the same logs.
    """
    if [entry.keys() for entry in one] != [entry.keys() for entry in two]:
        raise RuntimeError("not the same metrics were logged")
    return max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) for name in a)


def stopped_after(disks: tuple[Path, Path]) -> str:
    """The step after which both nodes stopped, from the checkpoint's files of both ranks.

    Raises:
        RuntimeError: there is no such checkpoint, or the run had ended.
    """
    if RunRecord.read(disks[0] / "run").finished:
        raise RuntimeError("the run ended before it was told to stop")
    parts = [
        sorted((disk / "run" / "model").glob(f"checkpoint-*/xpo_state_{rank}.json")) for rank, disk in enumerate(disks)
    ]
    steps = [[path.parent.name.rpartition("-")[2] for path in files] for files in parts]
    if len(steps[0]) != 1 or steps[0] != steps[1]:
        raise RuntimeError(f"checkpoints of node 0: {steps[0]}, of node 1: {steps[1]}; {last_error(disks)}")
    return f"both after step {steps[0][0]}"


def last_error(disks: tuple[Path, Path]) -> str:
    """The last line that looks like the reason."""
    lines = [line for node in (1, 0) for line in (disks[node] / f"output_{node}.log").read_text().splitlines()]
    reasons = [line for line in lines if "error:" in line.lower() and "ChildFailedError" not in line]
    return (reasons or ["no error was printed"])[0].strip()[:300]


if __name__ == "__main__":
    main()
