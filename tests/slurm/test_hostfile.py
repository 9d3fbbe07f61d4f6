"""Several nodes without a scheduler: the deepspeed launcher with a hostfile, started on each node."""

import json
import shutil
import subprocess

import pytest
from cluster import NODES
from tiny import REPOSITORY, launch_command, launch_environment, make_model, make_training_file


def test_hostfile_without_ssh(tmp_path):
    may_unshare = shutil.which("unshare") and not subprocess.run(["unshare", "--mount", "--uts", "true"]).returncode
    if not may_unshare:
        pytest.skip("nodes are host names of their own (unshare --mount --uts), which this system does not allow")
    make_model(tmp_path / "llama", "llama")
    make_training_file(tmp_path / "train.jsonl", 40, num_negatives=1)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost " + " ".join(NODES) + "\n")
    (tmp_path / "hostfile").write_text("".join(f"{node} slots=1\n" for node in NODES))
    command = launch_command(
        1,
        "recipes/train_gpt.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        tmp_path / "llama",
        "--train_files",
        tmp_path / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--cache_dir",
        tmp_path / "cache",
        "--global_batch_size",
        8,
        "--max_length",
        24,
        "--micro_batch_tokens",
        200,
        "--max_steps",
        3,
        "--report_to",
        "none",
    )
    first, last = command.index("--num_gpus"), command.index("--master_port")
    running = []
    for number, node in enumerate(NODES):
        nodes = [
            "--hostfile",
            str(tmp_path / "hostfile"),
            "--no_ssh",
            "--node_rank",
            str(number),
            "--master_addr",
            NODES[0],
        ]
        words = [*command[:first], *nodes, *command[last:]]
        script = f'mount --bind {tmp_path}/hosts /etc/hosts && hostname {node} && exec "$@"'
        running.append(
            subprocess.Popen(
                ["unshare", "--mount", "--uts", "sh", "-c", script, "sh", *words],
                cwd=REPOSITORY,
                env=launch_environment() | {"GLOO_SOCKET_IFNAME": "lo"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    outputs = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    assert "2 rank(s)" in outputs[0] + outputs[1]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
