"""A two-node Slurm cluster on this host, for the job scripts: real daemons, loopback only, ended by their pids."""

import os
import shutil
import subprocess
import time
from pathlib import Path

NODES = ("node1", "node2")
CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
SlurmdSpoolDir={dir}/spool-%n
StateSaveLocation={dir}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port1} Sockets=2 CoresPerSocket=32 RealMemory=1000000 Gres=gpu:8
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port2} Sockets=2 CoresPerSocket=32 RealMemory=1000000 Gres=gpu:8
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "unshare") if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)} here; apt-get install slurm-wlm munge"
    if os.geteuid():
        return "the daemons of Slurm are started as root here"
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "this system lets nobody make a mount namespace (unshare --mount --uts)"
    return None


class Cluster:
    """slurmctld and a slurmd per node. `sbatch` and the like run with the environment `self.environment`."""

    def __init__(self, folder: Path, ports: tuple[int, int, int]):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.running: dict[str, subprocess.Popen] = {}
        (folder / "state").mkdir(parents=True)
        values = dict(dir=folder, control_port=ports[0], port1=ports[1], port2=ports[2])
        (folder / "slurm.conf").write_text(CONF.format(**values))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Devices that look like GPUs to Slurm: each is another /dev/null.
        for number in range(8):
            os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "hosts").write_text("127.0.0.1 localhost " + " ".join(NODES) + "\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)

    def start(self) -> None:
        munge = [f"--socket={self.folder}/munge.socket", f"--key-file={self.folder}/munge.key"]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self._daemon("munged", ["munged", "--foreground", "--force", *munge])
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        self._wait(lambda: self.ask("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").split() == ["idle", "idle"])

    def start_node(self, node: str) -> None:
        """A node has its own host name and knows the others'; the rest it shares with this host."""
        script = f"mount --bind {self.folder}/hosts /etc/hosts && hostname {node} && exec slurmd -D -N {node}"
        self._daemon(node, ["unshare", "--mount", "--uts", "sh", "-c", script])

    def _daemon(self, name: str, command: list[str]) -> None:
        log = open(self.folder / f"{name}.out", "a")
        self.running[name] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def _wait(self, is_ready, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not is_ready():
            if time.monotonic() > deadline:
                logs = [f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*.log")]
                raise TimeoutError("the cluster did not start\n" + "\n".join(logs))
            time.sleep(0.1)

    def ask(self, *command: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600)
        return done.stdout

    def stop_daemon(self, name: str) -> None:
        process = self.running.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self) -> None:
        self.ask("scancel", "--state=PENDING")
        self.ask("scancel", "--signal=KILL", "--full", "--state=RUNNING")
        for name in list(reversed(self.running)):
            self.stop_daemon(name)
