"""Checkpoints: what comes back is what was saved, on any topology, and nothing damaged is ever used."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import check, launch, make_model, make_training_file

# Trained on 2 ranks: (ZeRO stage, bf16, LoRA). Full float32 training under ZeRO-0 is the plain reference.
KINDS = {
    f"zero{zero}_{'bf16' if bf16 else 'fp32'}_{'lora' if lora else 'full'}": dict(zero=zero, bf16=bf16, lora=lora)
    for zero, bf16, lora in [
        (0, False, False),
        (0, True, True),
        (1, True, False),
        (1, False, True),
        (2, False, False),
        (2, False, True),
        (2, True, False),
        (3, False, False),
        (3, False, True),
        (3, True, True),
    ]
}
HPZ = {
    "hpz_fp32_full": dict(zero=3, bf16=False, lora=False, hpz=2),
    "hpz_bf16_lora": dict(zero=3, bf16=True, lora=True, hpz=2),
}
SAVED, STEPS = 3, 6
# On how many ranks, what is loaded, under which stage.
MOVES = [
    (1, "zero2_fp32_full", 3),
    (1, "zero3_fp32_lora", 2),
    (1, "zero2_fp32_lora", 0),
    (4, "zero2_fp32_lora", 3),
    (4, "zero3_fp32_full", 2),
    (4, "zero0_fp32_full", 3),
    (4, "zero1_fp32_lora", 1),
    (2, "zero2_fp32_full", 3),
    (2, "zero3_fp32_full", 2),
    (2, "zero3_fp32_lora", 0),
    (2, "one_rank", 2),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from transformers import AutoTokenizer

    from ds_embed.data.store import build_training_store
    from ds_embed.data.tokenize import TextFormat

    root = tmp_path_factory.mktemp("checkpoints")
    # Attention dropout: a resumed run has to draw what the uninterrupted one drew.
    make_model(root / "model", "llama", attention_dropout=0.1)
    make_model(root / "model_plain", "llama")
    make_training_file(root / "train.jsonl", 60, num_negatives=1)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    form = TextFormat("", 24, True)
    store = build_training_store([root / "train.jsonl"], tokenizer, form, form, 1, root / "cache")
    (root / "out").mkdir()
    return root, str(store)


def run(place, num_ranks, cases):
    root, store = place
    (root / "cases.json").write_text(json.dumps({n: c | {"store": store} for n, c in cases.items()}))
    check(launch(num_ranks, "tests/workers/resume.py", root / "cases.json", root / "out"))
    return json.loads((root / "out" / f"answers{num_ranks or 1}.json").read_text())


def case(root, kind, **more):
    return {"model": str(root / "model"), "dropout": 0.1, "steps": STEPS} | kind | more


def checkpoint(root, name):
    return str(root / "out" / name / f"step_{SAVED:08d}")


@pytest.fixture(scope="module")
def answers(place):
    """All runs: 1 rank (saved for 2), 2 ranks (saved, resumed, moved), 1 and 4 ranks (moved)."""
    root, _ = place
    plain = {"model": str(root / "model_plain"), "dropout": 0.0}
    one = run(place, 0, {"one_rank": case(root, KINDS["zero2_fp32_full"], save_after=[SAVED], **plain)})
    cases = {}
    for name, kind in KINDS.items():
        cases[name] = case(root, kind, save_after=[SAVED], poison=True)
        cases[f"{name}_resumed"] = case(root, kind, load=checkpoint(root, name), check=name)
        if not kind["bf16"]:  # to move it: dropout depends on the cut into micro-batches, so without
            cases[f"{name}_plain"] = case(root, kind, save_after=[SAVED], **plain)
    for ranks in (2, 1, 4):
        for number, source, zero in MOVES:
            if number == ranks:
                origin = source if source == "one_rank" else f"{source}_plain"
                lora = source.endswith("lora")
                kind = dict(zero=zero, bf16=False, lora=lora, load=checkpoint(root, origin), **plain)
                cases[f"{source}_to_{ranks}_zero{zero}"] = case(root, kind)
        if ranks == 4:  # with copies within groups of two ranks
            for name, kind in HPZ.items():
                cases[name] = case(root, kind, save_after=[SAVED])
                cases[f"{name}_resumed"] = case(root, kind, load=checkpoint(root, name), check=name)
        one |= run(place, ranks, cases)
        cases = {}
    return one


@pytest.mark.parametrize("name", [*KINDS, *HPZ])
def test_resumed_run_is_bit_equal(place, answers, name):
    root, _ = place
    straight, resumed = answers[name], answers[f"{name}_resumed"]
    assert resumed["not_restored"] == []
    assert resumed["losses"] == {str(n): straight["losses"][str(n)] for n in range(SAVED + 1, STEPS + 1)}
    assert resumed["records"] == {number: straight["records"][number] for number in resumed["losses"]}
    assert straight["adam_step"] == resumed["adam_step"] == STEPS
    expected = load_file(root / "out" / f"{name}-{STEPS}.safetensors")
    got = load_file(root / "out" / f"{name}_resumed-{STEPS}.safetensors")
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


@pytest.mark.parametrize("ranks, source, zero", MOVES)
def test_moved_run_has_the_same_losses_and_samples(answers, ranks, source, zero):
    straight = answers[source if source == "one_rank" else f"{source}_plain"]
    moved = answers[f"{source}_to_{ranks}_zero{zero}"]
    assert list(moved["losses"]) == [str(n) for n in range(SAVED + 1, STEPS + 1)]
    assert moved["records"] == {number: straight["records"][number] for number in moved["losses"]}
    assert len({record for records in straight["records"].values() for record in records}) == STEPS * 8
    for number, loss in moved["losses"].items():
        assert loss == pytest.approx(straight["losses"][number], abs=1e-4, rel=1e-4)
    assert moved["adam_step"] == STEPS


@pytest.mark.parametrize("name", KINDS)
def test_gradient_that_is_not_finite_changes_nothing(answers, name):
    assert answers[name]["poison"] == {"noticed_by": 2.0, "changed": [], "goes_on": True}
