"""Learning rates step by step, the number of steps, and which weights AdamW decays."""

import math

import pytest
import torch
from tiny import make_model

from ds_embed.models.engine import _parameter_groups
from ds_embed.models.loading import find_model, load_encoder
from ds_embed.models.lora import add_lora
from ds_embed.settings import LoraArguments, OptimizerArguments
from ds_embed.settings.errors import UserError
from ds_embed.training.schedule import count_steps, learning_rate


def rates(max_steps, **settings):
    is_constant = settings.get("lr_scheduler") == "constant" and not settings.get("constant_steps")
    floor = {} if is_constant else {"min_learning_rate": 0.1}  # which a constant rate never reaches
    arguments = OptimizerArguments(learning_rate=1.0, **floor, **settings)
    return [learning_rate(step, max_steps, arguments) for step in range(1, max_steps + 1)]


def test_linear():
    got = rates(10, lr_scheduler="linear", warmup_steps=2, constant_steps=3)
    # Two of warmup, five that fall from 1 towards 0.1, three at 0.1.
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28, 0.1, 0.1, 0.1])


def test_warmup_as_a_share():
    assert rates(10, warmup_ratio=0.21, constant_steps=2) == rates(10, warmup_steps=3, constant_steps=2)
    assert rates(10, warmup_ratio=0.0) == rates(10)
    with pytest.raises(UserError, match="--warmup_ratio 1.0: must be below 1"):
        rates(10, warmup_ratio=1.0)
    with pytest.raises(UserError, match="give either this or --warmup_steps 2, not both"):
        rates(10, warmup_ratio=0.1, warmup_steps=2)


def test_cosine():
    got = rates(8, lr_scheduler="cosine", warmup_steps=2, constant_steps=2)
    halves = [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]
    assert got == pytest.approx([0.5, 1.0, *(0.1 + 0.9 * half for half in halves), 0.1, 0.1])


def test_constant():
    assert rates(6, lr_scheduler="constant", warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert rates(5, lr_scheduler="constant", constant_steps=2) == pytest.approx([1, 1, 1, 0.1, 0.1])


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup, constant", [(0, 0), (7, 0), (0, 7), (3, 4), (1, 6)])
def test_within_bounds_and_falling(scheduler, warmup, constant):
    got = rates(7, lr_scheduler=scheduler, warmup_steps=warmup, constant_steps=constant)
    assert all(0.1 <= rate <= 1 for rate in got[warmup:])
    assert all(a >= b for a, b in zip(got[warmup:], got[warmup + 1 :]))
    assert got[7 - constant :] == [0.1] * constant


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({}, 4),  # one epoch of 50 records, 16 at a time
        (dict(num_train_epochs=2.0), 7),
        (dict(num_train_epochs=0.1), 1),
        (dict(max_steps=5), 5),
        (dict(max_steps=5, num_train_epochs=1.0), 4),
        (dict(max_steps=3, num_train_epochs=1.0), 3),
    ],
)
def test_whichever_limit_comes_first(settings, steps):
    assert count_steps(50, 16, OptimizerArguments(**settings)) == steps


def test_schedule_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="--warmup_steps 3 and --constant_steps 2 exceed the 4 steps"):
        count_steps(50, 16, OptimizerArguments(warmup_steps=3, constant_steps=2))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(lr_scheduler="step"), "--lr_scheduler step: choose one of"),
        (dict(min_learning_rate=1e-3, learning_rate=1e-4), "--min_learning_rate 0.001: must not exceed"),
        (dict(adam_beta1=1.0), "--adam_beta1 1.0"),
        (dict(adam_epsilon=0.0), "--adam_epsilon 0.0"),
        (dict(max_steps=0), "--max_steps 0"),
        (dict(max_grad_norm=-1.0), "--max_grad_norm -1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerArguments(**settings)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("lora", [0, 4])
def test_biases_norms_and_temperature_are_not_decayed(tmp_path, kind, lora):
    source = find_model(str(make_model(tmp_path / kind, kind)))
    encoder = load_encoder(
        source, pooling="mean", bidirectional=False, bf16=False, attn_implementation=None, trust_remote_code=False
    )
    if lora:
        add_lora(encoder, LoraArguments(lora_rank=lora), seed=1, dtype=torch.float32)
    encoder.learn_temperature()
    groups = {group["weight_decay"]: group["params"] for group in _parameter_groups(encoder, 0.3)}
    decay_of = {id(parameter): decay for decay, parameters in groups.items() for parameter in parameters}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay_of
            continue
        undecayed = any(part in name.lower() for part in ("bias", "norm", "log_scale_change"))
        assert decay_of[id(parameter)] == (0.0 if undecayed else 0.3), name
    assert sum(map(len, groups.values())) == sum(p.requires_grad for p in encoder.parameters())
