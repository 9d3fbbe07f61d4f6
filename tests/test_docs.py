"""README and docs: links, commands, flags and tests that they name exist; pictures are those of their script."""

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache

import pytest
import settings_page
import yaml
from test_structure import ROOMS
from tiny import REPOSITORY, check, free_port, launch_environment, leave_out_when_fast, make_model, make_training_file

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
# Flags of the launchers, pytest, pip and other programs that commands in the docs start.
_OF_OTHERS = {"num_gpus", "hostfile", "no_ssh", "node_rank", "master_addr", "master_port", "standalone", "nnodes"}
_OF_OTHERS |= {"nproc_per_node", "log_level", "help", "version", "config"}


def drawings():
    spec = importlib.util.spec_from_file_location("drawings", DOCS / "drawings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page):
    """What a link may name behind #, as GitHub makes it from the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\btest_[a-z0-9_]+\.py\b", text):
        assert list((REPOSITORY / "tests").rglob(name)), f"{page.name}: {name}"
    for name in re.findall(
        r"(?:recipes|benchmarks|ds_configs|slurm|tests|docs)/[\w/]+\.(?:py|json|sh|yaml|md)\b", text
    ):
        assert (REPOSITORY / name).exists(), f"{page.name}: {name}"


@cache
def flags_of(command):
    """Every flag that the recipe of a command takes; of those that change nothing for it, plan has the trainers' too."""
    names = set(settings_page.settings_of(REPOSITORY / "recipes" / f"{command.replace('-', '_')}.py"))
    return names | _OF_OTHERS


def commands_in(text):
    """(command, the words behind it) of each ds-embed COMMAND and recipes/COMMAND.py in code blocks and spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.split(" #")[0]
            for found in re.finditer(r"(?:ds-embed |recipes/)([a-z][a-z_-]+)(?:\.py)?((?: .*)?$)", line):
                yield found[1].replace("_", "-"), found[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page):
    known = {path.stem.replace("_", "-") for path in (REPOSITORY / "recipes").glob("*.py")}
    for command, words in commands_in(page.read_text(encoding="utf-8")):
        assert command in known, f"{page.name}: {command}"
        for flag in re.findall(r"(?<!\S)--(\w+)", words):
            assert flag in flags_of(command), f"{page.name}: {command} --{flag}"


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if page.name != "settings.md"], ids=lambda page: page.name)
def test_pages_open_with_a_command(page):
    opening = page.read_text(encoding="utf-8").split("\n## ")[0]
    assert re.search(r"^```(bash)?\n(ds-embed|python|make|deepspeed|sbatch) ", opening, re.MULTILINE)


def test_the_first_page_names_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_figures_of_the_readme_stand_in_the_results():
    """Every figure of the table of measurements is one of docs/results.md."""
    readme, results = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    table = readme.split("## What was measured")[1].split("\n## ")[0]
    figures = re.findall(r"^\| [^|]+\| ([^|]+)\|", table, re.MULTILINE)[2:]
    for figure in (number for cell in figures for number in re.findall(r"\d[\d.,]*\d", cell)):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", results), figure


def test_pictures_are_those_of_the_script():
    module = drawings()
    for name, draw in module.DRAWINGS.items():
        assert (module.PICTURES / name).read_text(encoding="utf-8") == draw(), "run python docs/drawings.py"


def test_the_house_has_every_room_above_those_that_it_uses():
    floors = [[name for name, _ in rooms] for rooms in drawings().FLOORS]
    height = {name: -number for number, rooms in enumerate(floors) for name in rooms}
    assert height.keys() == ROOMS.keys()
    for room, used in ROOMS.items():
        assert all(height[other] < height[room] for other in used)


def test_the_skypilot_job_runs_a_recipe_with_flags_that_exist():
    job = yaml.safe_load((DOCS / "skypilot.yaml").read_text(encoding="utf-8"))
    assert job["resources"]["accelerators"] and job["num_nodes"] == 2
    script = re.sub(r"\\\n\s*", " ", job["run"])
    check(subprocess.run(["bash", "-n", "-c", job["setup"] + script], capture_output=True, text=True))
    recipe, flags = re.search(r"recipes/(\w+)\.py (.*)", script).groups()
    assert set(re.findall(r"--(\w+)", flags)) <= flags_of(recipe)


def test_the_dockerfile_installs_pinned_versions_of_a_pinned_image():
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^FROM nvidia/cuda:\d+\.\d+\.\d+-\S+$", text, re.MULTILINE)
    installs = re.findall(r"pip install (.*)", text)
    assert installs and all("--constraint constraints.txt" in line for line in installs)


def train_flags(folder):
    make_model(folder / "llama", "llama")
    make_training_file(folder / "train.jsonl", 16)
    return [
        *("--deepspeed", "zero2", "--model_name_or_path", folder / "llama", "--train_files", folder / "train.jsonl"),
        *("--output_dir", folder / "run", "--cache_dir", folder / "cache", "--max_steps", 2, "--report_to", "none"),
        *("--global_batch_size", 4, "--lora_rank", 4),
    ]


def run(command, folder, **environment):
    words = [str(word) for word in command]
    environment = launch_environment() | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_torchrun_starts_the_ranks(tmp_path):
    """As clusters.md has it: two ranks on CPUs, one run."""
    leave_out_when_fast()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--nnodes", 1, "--node_rank", 0]
    torchrun += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    done = check(run([*torchrun, REPOSITORY / "recipes" / "train_gpt.py", *train_flags(tmp_path)], tmp_path))
    output = done.stdout + done.stderr
    assert "2 rank(s)" in output and f"ds-embed report {tmp_path / 'run'}\n" in output
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()


def test_what_srun_runs_by_hand_is_a_rank(tmp_path):
    """The words that clusters.md gives to srun, with the variables that Slurm gives to each of two tasks."""
    leave_out_when_fast()
    text = (DOCS / "clusters.md").read_text(encoding="utf-8").split("## srun by hand")[1]
    script = re.search(r"srun .*? bash -c '(.*?)'", text, re.DOTALL)[1]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    entry = bin_folder / "ds-embed"
    entry.write_text(f"#!{sys.executable}\nfrom ds_embed.cli import main\nmain()\n")
    entry.chmod(0o755)
    environment = launch_environment() | {"PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    command = ["bash", "-c", script, "train-gpt", *map(str, train_flags(tmp_path))]
    tasks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    output = "".join(task.communicate(timeout=600)[0] for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], output[-6000:]
    assert "2 rank(s)" in output


def test_python_in_the_docs_parses():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:python)?\n((?:from|import) .*?)^```", text, re.MULTILINE | re.DOTALL):
            ast.parse(block)
