"""Flags, YAML and the DeepSpeed JSON: what wins, what is refused, and that nothing stays "auto"."""

import json
import re
from dataclasses import dataclass

import pytest
from tiny import REPOSITORY

from ds_embed.settings import LoraArguments, OptimizerArguments, parse_arguments, resolve_deepspeed_config
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting
from ds_embed.settings.parsing import ELSEWHERE


@dataclass
class Sample:
    output_dir: str = setting("folder")
    max_steps: int = setting("steps", default=10)
    bf16: bool = setting("precision", default=True)
    dims: list[int] = setting("dimensions", default_factory=lambda: [1])
    prefix: str | None = setting("text", default=None)
    learning_rate: float = setting("rate", default=1e-4)
    data: list[str] = setting("data", default_factory=lambda: ["a:b"], files=True)


def parse(*argv):
    return parse_arguments(Sample, argv=[str(word) for word in argv])[0]


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: from yaml\nmax_steps: 3\nbf16: false\ndims: [4, 8]\nlearning_rate: 1e-3\nprefix:\n")
    got = parse("--config", file, "--max_steps", 7)
    assert got == Sample("from yaml", 7, False, [4, 8], None, 1e-3)
    assert parse(f"--config={file}", "--bf16", "true", "--prefix", "").bf16 is True
    assert parse("--output_dir", "x") == Sample("x")
    assert parse("--output_dir", "x", "--local_rank=3") == Sample("x")  # added by the launcher


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["missing required flag(s)", "--output_dir"]),
        (["--output_dir", "x", "--max_step", "3"], ["unknown flag --max_step", "did you mean --max_steps"]),
        (["--output_dir", "x", "--steps", "3"], ["unknown flag --steps", "did you mean --max_steps"]),
        (["--output_dir", "x", "--epochs", "3"], ["--epochs: unknown flag; use --num_train_epochs"]),
        (["--output_dir", "x", "stray"], ["unexpected argument 'stray'"]),
        (["--output_dir", "x", "--max_steps", "1.5"], ["max_steps", "1.5"]),
        (["--output_dir", "x", "--bf16", "perhaps"], ["bf16", "perhaps"]),
        (["--output_dir", "x", "--config"], ["--config: expected one argument"]),
        (["--config", "absent.yaml"], ["absent.yaml", "no such file"]),
        (["--output_dir", "x", "--data", "a:b", "--data=a:c"], ["--data: given twice"]),
    ],
)
def test_mistakes_are_value_errors(argv, words):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n- b\n", ["expected 'name: value'", "list"]),
        ("max_steps: {a: 1}\noutput_dir: x\n", ["max_steps", "not a mapping"]),
        ("max_step: 1\n", ["unknown key 'max_step'", "did you mean max_steps"]),
        ("a: [1\n", ["c.yaml:", "not valid YAML"]),
        ("output_dir: x\nmax_steps: 1\nmax_steps: 2\n", ["c.yaml:3: not valid YAML: 'max_steps' stands twice"]),
    ],
)
def test_yaml_mistakes_name_the_file(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        parse("--config", file)
    assert all(word in str(caught.value) for word in ["c.yaml", *words]), caught.value


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LoraArguments(lora_rank=-1), ["--lora_rank -1", "at least 0"]),
        (lambda: LoraArguments(lora_dropout=1.0), ["--lora_dropout 1.0", "below 1"]),
        (lambda: OptimizerArguments(learning_rate=0), ["--learning_rate 0", "greater than 0"]),
        (lambda: OptimizerArguments(learning_rate=1e-5, min_learning_rate=1e-4), ["--min_learning_rate", "exceed"]),
        (lambda: OptimizerArguments(lr_scheduler="cosin"), ["--lr_scheduler cosin", "cosine"]),
        (lambda: OptimizerArguments(adam_beta2=1.0), ["--adam_beta2 1.0"]),
    ],
)
def test_values_out_of_range_name_setting_value_and_cure(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value


def resolve(path, bf16=True):
    return resolve_deepspeed_config(str(path), bf16=bf16, max_grad_norm=0.5, num_ranks=8)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
@pytest.mark.parametrize("bf16", [True, False])
def test_every_shipped_config_resolves(path, bf16):
    config = resolve(path, bf16)
    assert "auto" not in json.dumps(config)
    assert config["bf16"]["enabled"] is bf16 and config["gradient_clipping"] == 0.5
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    stage = config["zero_optimization"]["stage"]
    assert ("data_types" in config) == (bf16 and stage > 0)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"train_batch_size": 64}, ["train_batch_size", "--global_batch_size"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer", "--learning_rate"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "--max_grad_norm"]),
        ({"tensorboard": {"enabled": True}}, ["tensorboard", "--report_to"]),
        ({"fp16": {"enabled": True}}, ["fp16", "--bf16"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled", "--bf16 is true"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, ["contiguous_gradients"]),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["mics_shard_size", "zero_hpz_partition_size"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, ["zero_hpz_partition_size", "8 rank(s)"]),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, ["zero_optimization.reduce_bucket_size"]),
    ],
)
def test_a_json_that_contradicts_us_is_refused(tmp_path, config, words):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        resolve(file)
    assert all(word in str(caught.value) for word in ["ds.json", *words]), caught.value


def test_broken_json_names_the_line(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{\n "a": 1,\n}')
    with pytest.raises(ValueError, match=r"ds.json:3: not valid JSON"):
        resolve(file)
    with pytest.raises(ValueError, match="is a directory"):
        resolve(tmp_path)


def test_flags_of_other_frameworks_are_answered_with_ours(tmp_path):
    known = set(re.findall(r"`--(\w+)`", (REPOSITORY / "docs" / "settings.md").read_text()))
    for name, answer in ELSEWHERE.items():
        assert name not in known, name
        assert set(re.findall(r"--(\w+)", answer)) <= known, name
        with pytest.raises(UserError, match=f"^--{name}: unknown flag; {re.escape(answer)}$"):
            parse("--output_dir", "x", f"--{name.replace('_', '-')}", "1")
    with pytest.raises(
        UserError, match="--per_device_train_batch_size: unknown flag; use --global_batch_size, over all ranks"
    ):
        parse("--output_dir", "x", "--per_device_train_batch_size=8")
    (tmp_path / "c.yaml").write_text("save_steps: 3\n")
    with pytest.raises(UserError, match="c.yaml: save_steps: unknown key; use --save_interval"):
        parse("--config", tmp_path / "c.yaml")
