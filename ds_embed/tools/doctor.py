"""Reports this machine's hardware, versions, launchers and disk space, and what will be slow or fail on it."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import timeit
from pathlib import Path

import torch

import ds_embed
from ds_embed.models.cpu import multiplies_bfloat16

GIB = 2**30
_REQUIRED = ("torch", "deepspeed", "transformers", "peft", "numpy", "faiss-cpu", "pyarrow")
# The purpose of each, and the extra in setup.py that installs it.
_OPTIONAL = {
    "sentence-transformers": ("export --format sentence-transformers", "export"),
    "mteb": ("MTEBModel", "mteb"),
    "bitsandbytes": ("--load_in_4bit", "quantized"),
    "scikit-learn": ("report --map tsne", "report"),
}


def examine(cache_dir: str, output_dir: str) -> str:
    """A line per subject with what was found; below, after "!", what is slow or fails here and how to fix it.

    Takes a few seconds: it starts torch and DeepSpeed, and times a matrix product in each precision.
    """
    found: dict[str, str] = {}
    notes: list[str] = []
    for look in (_processor, _gpus, _versions, _launchers):
        look(found, notes)
    models = os.environ.get("HF_HOME", "~/.cache/huggingface")
    _disks(found, notes, {"cache_dir": cache_dir, "output_dir": output_dir, "HF_HOME": models})
    lines = [f"{subject:<14} {text}" for subject, text in found.items()]
    return "\n".join([*lines, "", *(f"! {note}" for note in notes or ["nothing stands out"])])


def _processor(found: dict[str, str], notes: list[str]) -> None:
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found["machine"] = f"{platform.node()}, {platform.system()} {platform.release()} on {platform.machine()}"
    found["processor"] = f"{cores} cores for this process, of {os.cpu_count()}; {memory / GIB:.0f} GiB of memory"
    quota = Path("/sys/fs/cgroup/cpu.max")  # a container's quota: microseconds (or max) per period of microseconds
    allowed, period = quota.read_text(encoding="utf-8").split() if quota.is_file() else ("max", "1")
    if allowed != "max" and int(allowed) < cores * int(period):
        threads = max(1, int(allowed) // int(period))
        notes.append(f"the container has the time of {threads} of {cores} cores: set OMP_NUM_THREADS={threads}")
    rates = f"{_rate('cpu', torch.float32, 1024):,.0f} GFLOP/s in float32"
    if multiplies_bfloat16():
        rates += f", {_rate('cpu', torch.bfloat16, 1024):,.0f} in bfloat16"
    else:
        notes.append("this CPU has no bfloat16 instructions: its products go through float32, as fast as float32")
    found["its products"] = f"{rates}, on {torch.get_num_threads()} threads"


def _gpus(found: dict[str, str], notes: list[str]) -> None:
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rate = _rate(f"cuda:{index}", torch.bfloat16, 8192) / 1000
        memory = card.total_memory / GIB
        found[f"GPU {index}"] = f"{card.name}, {memory:.0f} GiB, {rate:,.0f} TFLOP/s in bfloat16 products"
        if card.major < 8:
            notes.append(f"GPU {index} has no bfloat16 units: --bf16 false (float32) is faster there")
    if torch.cuda.device_count():
        return
    found["GPUs"] = "none that torch sees"
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        notes.append(f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: install its CUDA build")
    notes.append("no GPU: training is for small models and short texts; ds-embed plan says what a job takes on GPUs")


def _versions(found: dict[str, str], notes: list[str]) -> None:
    versions = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    found["ds_embed"] = f"{ds_embed.__version__} in {ds_embed.__path__[0]}, Python {platform.python_version()}"
    found["packages"] = ", ".join(f"{name} {versions.get(name, 'MISSING')}" for name in _REQUIRED)
    for name, (purpose, extra) in _OPTIONAL.items():
        if name not in versions:
            notes.append(f"{name} is not installed, which {purpose} needs: pip install 'ds-embed[{extra}]'")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # otherwise DeepSpeed warns
    from deepspeed.ops import __compatible_ops__ as fits

    ready = ", ".join(sorted(name for name, fit in fits.items() if fit)) or "none"
    found["DeepSpeed"] = f"operators that fit this machine: {ready} (ds_embed needs none)"


def _launchers(found: dict[str, str], notes: list[str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    names = ("deepspeed", "torchrun", "srun", "sbatch")
    found["launchers"] = ", ".join(name for name in names if shutil.which(name, path=path)) or "none"
    if shutil.which("sinfo"):
        asked = subprocess.run(["sinfo", "-h", "-o", "%P %D nodes, %G"], capture_output=True, text=True)
        rows = (asked.stdout + asked.stderr).strip().splitlines() or ["no partition"]
        found["Slurm"] = f"does not answer: {rows[-1]}" if asked.returncode else "; ".join(rows)


def _disks(found: dict[str, str], notes: list[str], folders: dict[str, str]) -> None:
    for subject, name in folders.items():
        folder = Path(name).expanduser().absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free / GIB
        found[subject] = f"{folder}, {free:,.0f} GiB free" + ("" if os.access(there, os.W_OK) else ", not writable")
        if free < 20:
            notes.append(f"{subject}: {free:.1f} GiB free in {there}; the weights of a 7B model alone take 15")
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total / GIB
        found["/dev/shm"] = f"{size:.2g} GiB"
        if size < 1:
            notes.append("/dev/shm is too small for NCCL in most jobs: docker run --shm-size 8g, or --ipc host")


def _rate(device: str, dtype: torch.dtype, size: int) -> float:
    """GFLOP/s of a product of two (size, size) matrices: the best of four runs, the first of which is a warm-up."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    # item() waits for the device.
    return 2 * size**3 / min(timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=4)) / 1e9
