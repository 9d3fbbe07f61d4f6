"""The command ds-embed, as a wheel installs it and from a folder that holds nothing."""

import json
import re
import subprocess
import sys
import zipfile

import pytest
from tiny import REPOSITORY, check, free_port, launch_environment, leave_out_when_fast, make_model, make_training_file


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from this checkout and unpacked beside the packages of this environment."""
    leave_out_when_fast()
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    ignored = [".git", ".venv", "runs", "build", "tests", "docs", "*.egg-info", "__pycache__"]
    tar = f"tar -C {REPOSITORY} {' '.join(f'--exclude={name}' for name in ignored)} -cf - . | tar -C {source} -xf -"
    source.mkdir()
    subprocess.run(tar, shell=True, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", root, source]
    check(subprocess.run([str(word) for word in command], capture_output=True, text=True))
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "site")
    assert "ds-embed = ds_embed.cli:main" in next((root / "site").glob("*.dist-info")).joinpath(
        "entry_points.txt"
    ).read_text(encoding="utf-8")
    return root / "site"


def ds_embed(installed, folder, *arguments):
    words = [sys.executable, "-c", "from ds_embed.cli import main; main()", *map(str, arguments)]
    environment = launch_environment() | {"PYTHONPATH": str(installed)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_the_wheel_trains_encodes_and_evaluates_from_an_empty_folder(installed, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    make_model(tmp_path / "bert", "bert")
    make_training_file(tmp_path / "train.jsonl", 10)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for name, keys in (("q.jsonl", ("query", "query_id", "doc_id")), ("d.jsonl", ("pos_doc", "doc_id"))):
        lines = [json.dumps({key: record[key] for key in keys}) + "\n" for record in records]
        (tmp_path / name).write_text("".join(lines))
    train = ["--num_gpus", 2, "--master_port", free_port(), "--deepspeed", "zero2"]
    train += ["--model_name_or_path", tmp_path / "bert", "--train_files", tmp_path / "train.jsonl", "--max_steps", 2]
    train += ["--global_batch_size", 4, "--output_dir", "run", "--cache_dir", tmp_path / "cache", "--report_to", "none"]
    screen = check(ds_embed(installed, empty, "train-bert", *train))
    assert not re.search(r"launch|runner|accelerator|kernels", screen.stdout + screen.stderr)  # not asked for
    encode = ["--model_name_or_path", "run", "--query_files", tmp_path / "q.jsonl", "--doc_files", tmp_path / "d.jsonl"]
    check(ds_embed(installed, empty, "generate", *encode, "--output_prefix", "out", "--cache_dir", tmp_path / "cache"))
    measured = ["--embeddings", "out/consumed_samples8", "--query_files", tmp_path / "q.jsonl"]
    assert "nDCG@10" in check(ds_embed(installed, empty, "evaluate", *measured)).stdout
    assert "report.html" in check(ds_embed(installed, empty, "report", "run")).stdout
    assert (empty / "run" / "report" / "report.html").stat().st_size > 10_000


def test_mistakes_and_help(installed, tmp_path):
    overview = check(ds_embed(installed, tmp_path, "--help")).stdout
    assert "train-gpt" in overview and "Train a decoder" in overview and "mine-negatives" in overview
    wrong = ds_embed(installed, tmp_path, "train_gtp")
    assert (
        wrong.returncode == 2
        and wrong.stderr == "error: ds-embed train-gtp: no such command; did you mean train-gpt?\n"
    )
    alone = ds_embed(installed, tmp_path, "convert", "--num_gpus", 2)
    assert alone.returncode == 2 and "--num_gpus: this command is one process" in alone.stderr
    assert (
        "--global_batch_size" in check(ds_embed(installed, tmp_path, "train-bert", "--num_gpus", "2", "--help")).stdout
    )
