"""A real Slurm of one controller and two nodes on this machine, started once, on the loopback interface only.

Needs root and the programs of Debian's slurm-wlm. Elsewhere these tests are skipped with one line; where
MOE_BENCH_CI_REQUIRED or CI is set that is an error.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
NODES = ("n1", "n2")

CONFIGURATION = """\
ClusterName=moe_bench_test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# a job that is queued again waits until its old credential has expired, two minutes if nothing is said
AuthInfo=cred_expire=5
# without these two, daemons without authentication would listen on every interface
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
# eight cores are claimed whatever the machine has, so that four ranks fit a node
SlurmdParameters=config_overrides
SlurmdTimeout=5
MessageTimeout=5
KillWait=3
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1_port} CPUs=8 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2_port} CPUs=8 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The cluster, and what tests do with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {name: os.environ[name] for name in ("HOME", "PATH", "LANG") if name in os.environ} | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MOE_BENCH_PYTHON": sys.executable,
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        (self.folder / "state").mkdir()
        ports = dict(zip(("controller_port", "n1_port", "n2_port"), free_ports(3), strict=True))
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, **ports))
        self._start_daemon("slurmctld", "-D")
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
            self.start_node(node)
        self.wait_until(lambda: self.idle_nodes() == len(NODES), "both nodes are idle")

    def start_node(self, node: str) -> None:
        self._start_daemon(node, "-D", "-N", node, program="slurmd")

    def _start_daemon(self, name: str, *arguments: str, program: str | None = None) -> None:
        output = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            (program or name, *arguments), env=self.env, stdout=output, stderr=output
        )
        output.close()

    def kill_node(self, node: str) -> None:
        """The node dies: its slurmd, its slurmstepd, and their tasks."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        self.kill_steps(node)

    def kill_steps(self, node: str) -> None:
        tasks = self.tasks(node)
        # a slurmstepd clears its own environment; it is known by its tasks
        steps = [pid for pid in map(parent, tasks) if name_of(pid) == "slurmstepd"]
        for pid in (*steps, *tasks):
            kill(pid)

    def tasks(self, *nodes: str) -> list[int]:
        """Processes of this cluster's jobs on `nodes`."""
        marks = [f"SLURMD_NODENAME={node}" for node in nodes]
        ours = f"SLURM_CONF={self.env['SLURM_CONF']}"
        return [
            pid
            for pid in processes()
            if ours in (variables := read_proc(pid, "environ").split("\0")) and {*marks} & {*variables}
        ]

    def stop(self) -> None:
        self.run("scancel", "--user=root")
        for node in NODES:
            self.kill_steps(node)
        for name in (*NODES, "slurmctld"):
            if name in self.daemons:
                self.daemons[name].terminate()
        for daemon in self.daemons.values():
            daemon.wait(timeout=20)

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.env | env, cwd=cwd or self.folder
        )

    def sbatch(self, *arguments: str, cwd: Path | None = None, **env: str) -> int:
        """Queue a job as a user would; gives its number."""
        done = self.run("sbatch", *arguments, cwd=cwd, **env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    def idle_nodes(self) -> int:
        done = self.run("sinfo", "--noheader", "--states=idle", "--format=%D")
        return int(done.stdout.strip() or 0)

    def job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says; without a database it is the only record."""
        words = self.run("scontrol", "show", "job", str(job_id)).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job_id: int, within_s: float = 120) -> dict[str, str]:
        """The job's fields once it has ended."""
        active = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "")
        self.wait_until(
            lambda: self.job(job_id).get("JobState", "") not in active, f"job {job_id} has ended", within_s
        )
        return self.job(job_id)

    def output(self, job_id: int) -> str:
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text() if path.is_file() else ""

    def wait_until(self, condition: Callable[[], bool], what: str, within_s: float = 60) -> None:
        """Stay until `condition` holds. The bound only keeps a broken test from hanging."""
        give_up = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > give_up:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.out")))
                pytest.fail(f"waited {within_s:.0f} s in vain until {what}\n{logs}")
            time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def read_proc(pid: int, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


def name_of(pid: int) -> str:
    return read_proc(pid, "comm").strip()


def parent(pid: int) -> int:
    return int(next((line.split()[1] for line in read_proc(pid, "status").splitlines() if "PPid" in line), 0))


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended meanwhile
        return


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    missing += ["root"] if os.geteuid() else []
    if missing:
        reason = f"needs a real Slurm, missing: {', '.join(missing)} (apt-get install slurm-wlm)"
        if os.environ.get("MOE_BENCH_CI_REQUIRED") == "1" or os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository whose path has a space; its records go into it and not into ours."""
    copy = tmp_path_factory.mktemp("user") / "my checkout"
    for name in ("moe_bench", "recipes", "slurm", "results/published"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    return copy


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory in which the user types."""
    return tmp_path
