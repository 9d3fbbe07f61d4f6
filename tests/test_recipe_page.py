"""docs/recipe.md: its small form runs as it stands, and the YAML of its large form is what the command reads."""

import json
import re
import shlex
import string
import subprocess
import sys

import forked
import yaml
from tiny import REPOSITORY, check, free_port, launch_environment, leave_out_when_fast, make_model, make_training_file

from ds_embed.settings import TRAINING_ARGUMENTS, DataArguments, DryRunArguments, StepArguments, parse_arguments

PAGE = (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8")


def test_the_settings_of_the_first_stage_are_read(tmp_path):
    settings = yaml.safe_load(re.search(r"^```\n(model_name_or_path:.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1])
    for number, entry in enumerate(settings["train_files"]):
        entry["path"] = str(make_training_file(tmp_path / f"{number}.jsonl", 4, 7))
    path = tmp_path / "stage1.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    flags = ["--config", str(path), "--output_dir", str(tmp_path / "run"), "--deepspeed", "zero2"]
    read = {type(one): one for one in parse_arguments(*TRAINING_ARGUMENTS, DryRunArguments, argv=flags)}
    data, step = read[DataArguments], read[StepArguments]
    assert step.negatives_per_file == ["all", "all", "hard", "hard"] and data.hard_negatives_per_file == [7, 7, 7, 1]
    assert (step.global_batch_size, step.matryoshka_dims) == (512, [1024, 512, 256, 128])


def test_the_small_form_runs_as_it_stands(tmp_path):
    """With a tiny model and texts in place of the quickstart's; every other line is the page's own."""
    leave_out_when_fast()
    script = re.search(r"^```bash\n(.*?)^```", PAGE.split("\n## The same on two cores")[1], re.MULTILINE | re.DOTALL)[1]
    made, lines = script.split("cd runs/recipe\n")
    lines = re.sub("--num_gpus 2", lambda _: f"--num_gpus 2 --master_port {free_port()}", lines)
    assert re.findall(r"quickstart/(\w+)\.py", made) == ["make_model", "make_pairs"]
    make_model(tmp_path / "base", "llama")
    data = tmp_path / "data"
    data.mkdir()
    make_training_file(data / "train.jsonl", 1500)
    texts = [json.loads(line) for line in open(data / "train.jsonl", encoding="utf-8")][:40]
    for name, keys in (("test_queries", ("query", "query_id", "doc_id")), ("test_docs", ("pos_doc", "doc_id"))):
        records = [
            {key: text.get(key, f"{key}{number}") for key in keys} | {"doc_id": f"d{number}"}
            for number, text in enumerate(texts)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (tmp_path / "ds_embed_.py").write_text("from ds_embed.cli import main\nmain()\n")
    environment, printed = launch_environment(), ""
    for line in filter(None, lines.replace("\\\n", "").splitlines()):
        if line.startswith("export "):
            name, value = line.removeprefix("export ").split("=", 1)
            environment[name] = value.strip('"')
        elif line.startswith("ds-embed "):
            words = shlex.split(string.Template(line.removeprefix("ds-embed ")).substitute(environment))
            command = [sys.executable, str(tmp_path / "ds_embed_.py"), *words]
            printed += check(forked.run(command, environment, tmp_path, timeout=600)).stdout
        else:
            subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    assert printed.count("compared with") == 2
    for name in ("out1/consumed_samples960", "reranked1", "out2/consumed_samples480"):
        assert 0 < json.loads((tmp_path / name / "metrics.json").read_text())["nDCG@10"] <= 1
