"""The command `ds-embed`: `ds-embed train-gpt FLAGS` is recipes/train_gpt.py from any folder.

    ds-embed train-gpt --deepspeed zero3 --model_name_or_path MODEL --train_files pairs.jsonl --output_dir RUN
    ds-embed train-gpt --num_gpus 8 ...        # ranks started by DeepSpeed's launcher, whose flags stand first

In a job that is started already (deepspeed, torchrun, srun with RANK and WORLD_SIZE) the process is one of its ranks.
"""

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

from ds_embed.settings.shipped import shipped_folder

# Recipes that share their work among ranks; the others are one process. Without the launcher's flags each GPU gets a rank,
# but not with evaluate, which searches on the CPU unless told otherwise.
_WITH_RANKS = {"train-gpt", "train-bert", "train-reranker", "generate", "mine-negatives", "rerank", "benchmark"}
_WITH_RANKS |= (_ON_REQUEST := {"evaluate"})
# Flags of DeepSpeed's launcher that a command line may start with, all with a value but --no_ssh.
_LAUNCHER = {"--num_gpus", "--num_nodes", "--hostfile", "--include", "--exclude", "--master_port", "--master_addr"}
_LAUNCHER |= {"--launcher", "--launcher_args", "--ssh_port", "--node_rank", "--no_ssh", "--log_level"}
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and of Windows' Linux
EXIT_USER_ERROR = 2


def commands() -> dict[str, Path]:
    """Every recipe by the name of its command, in alphabetical order."""
    return {path.stem.replace("_", "-"): path for path in sorted(shipped_folder("recipes").glob("*.py"))}


def main() -> None:
    """Run the command that the arguments name; its exit code is the process's."""
    name, *arguments = sys.argv[1:] or ["--help"]
    known = commands()
    if name in ("--help", "-h", "help"):
        print(_overview(known))
        raise SystemExit(0)
    if name == "--version":
        from ds_embed import __version__

        print(f"ds-embed {__version__}")
        raise SystemExit(0)
    name = name.replace("_", "-")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        print(f"error: ds-embed {name}: no such command; {hint}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
    launcher, flags = _split(arguments)
    if name in _WITH_RANKS and (late := [flag for flag in flags if flag.split("=")[0] in _LAUNCHER]):
        print(f"error: {late[0]}: a flag of the launcher stands first: ds-embed {name} {late[0]} ...", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
    asks_for_help = "--help" in flags or "-h" in flags
    if name in _WITH_RANKS and not asks_for_help and "RANK" not in os.environ:
        if not launcher and name not in _ON_REQUEST and (num_gpus := _num_gpus()) > 1:
            launcher = ["--num_gpus", str(num_gpus)]
        if launcher:
            if "--log_level" not in launcher:
                launcher = ["--quiet", *launcher]  # else twelve lines of the launcher's own stand before ours
            if not any(map(os.path.exists, _GPU_DEVICES)):
                os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else each of its processes warns that it found none
            command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, str(known[name]), *flags]
            os.execv(sys.executable, command)
    elif launcher and not asks_for_help:
        reason = "this process is a rank already" if name in _WITH_RANKS else "this command is one process"
        print(f"error: {launcher[0]}: {reason}; leave the launcher's flags out", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
    sys.argv = [str(known[name]), *flags]
    runpy.run_path(str(known[name]), run_name="__main__")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's flags that stand first, and the rest."""
    end = 0
    while end < len(arguments) and arguments[end].split("=")[0] in _LAUNCHER:
        end += 1 if "=" in arguments[end] or arguments[end] == "--no_ssh" else 2
    return arguments[:end], arguments[end:]


def _num_gpus() -> int:
    """GPUs that this process sees, without starting CUDA in it."""
    import torch

    return torch.cuda.device_count()


def _overview(known: dict[str, Path]) -> str:
    lines = ["usage: ds-embed COMMAND [--num_gpus N] FLAGS", "", "commands (ds-embed COMMAND --help lists its flags):"]
    for name, path in known.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<16} {text.splitlines()[0] if text else ''}")
    return "\n".join(lines)
