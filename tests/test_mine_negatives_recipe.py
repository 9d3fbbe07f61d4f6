"""recipes/mine_negatives.py as users run it: two ranks that are killed and started again, against one process."""

import os
import signal
import time

import pytest
import torch
from mining_material import run
from tiny import check, launch, leave_out_when_fast, make_model, make_tokenizer, make_training_file, start

from ds_embed.settings import TextArguments


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification

    root = tmp_path_factory.mktemp("mine")
    make_model(root / "llama", "llama")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(root / "judge")
    make_tokenizer(root / "judge", bert=True)
    make_training_file(root / "train.jsonl", 330, num_negatives=1, seed=2)
    return root


SETTINGS = {
    "cross_encoder": "judge",
    "relative_margin": 0.05,
    "num_negatives": 3,
    "range_max": 40,
    "sampling": "random",
    "bf16": False,
    "micro_batch_tokens": 1000,
}


def flags(root, output):
    given = dict(SETTINGS, cross_encoder=root / "judge", model_name_or_path=root / "llama", max_length=40)
    given |= {"train_files": root / "train.jsonl", "output_file": root / output}
    return [
        word for name, value in given.items() for word in (f"--{name}", str(value).lower() if value is False else value)
    ]


def test_two_ranks_killed_and_started_again_write_what_one_process_writes(place):
    leave_out_when_fast()
    settings = dict(SETTINGS, cross_encoder=str(place / "judge"))
    run(place, "one.jsonl", model=place / "llama", text=TextArguments(max_length=40), **settings)

    job = start(2, "recipes/mine_negatives.py", *flags(place, "two.jsonl"), log=place / "log")
    work, deadline = place / "two.jsonl.work", time.monotonic() + 240
    while not list(work.glob("chunk*.npz")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert work.exists(), (place / "log").read_text(errors="replace")[-3000:]  # it was killed while it mined
    assert list(work.glob("chunk*.npz")) and not (place / "two.jsonl").exists()
    again = check(launch(2, "recipes/mine_negatives.py", *flags(place, "two.jsonl")))
    assert f"going on with what {work.resolve()} holds" in again.stderr
    assert "encoding doc" not in again.stderr  # the vectors were there
    for suffix in ("", ".summary.json", ".scores.png"):
        assert (place / f"two.jsonl{suffix}").read_bytes() == (place / f"one.jsonl{suffix}").read_bytes()
    assert (
        " mined; " in again.stdout and "left out: positive " in again.stdout and '"negatives_mined"' not in again.stdout
    )
    assert f"{work}/vectors" not in again.stderr and not work.exists()
