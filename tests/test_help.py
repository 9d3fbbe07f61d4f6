"""--help: the flags to know first, then every other by subject, each once, with the recipe's own default."""

import re

import pytest
from tiny import load_recipe

from ds_embed import cli
from ds_embed.settings.errors import UserError
from ds_embed.settings.help_page import KNOW_FIRST


def help_of(recipe, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"recipes/{recipe}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        load_recipe(recipe).main()
    assert end.value.code == 0
    return capsys.readouterr().out


def test_trainers_open_with_the_flags_to_know(capsys, monkeypatch):
    page = help_of("train_bert", capsys, monkeypatch)
    first = page.split("\n\n")[2]
    assert re.findall(r"^ +--(\w+)", first, re.MULTILINE) == list(KNOW_FIRST)
    flags = re.findall(r"^ +--(\w+)", page, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 80
    assert {"LoRA:", "optimizer:", "batch and loss:", "validation:"} <= set(page.splitlines())
    assert "peak learning rate [> 0] (default: 2e-05)" in page and "(required)" in first


def test_other_recipes_have_their_own_flags(capsys, monkeypatch):
    page = help_of("evaluate", capsys, monkeypatch)
    assert "to know first" not in page and "usage: ds-embed evaluate FLAGS" in page
    assert re.search(
        r"--measures +measures, named .*\(default: nDCG@10 RR@10 R@1 R@10 R@100\)", re.sub(r"\s+", " ", page)
    )


def test_what_must_be_given_stands_first(capsys, monkeypatch):
    flags = re.findall(r"^ +--(\w+)", help_of("rerank", capsys, monkeypatch), re.MULTILINE)
    assert flags[:4] == ["model_name_or_path", "query_files", "doc_files", "output_file"]
    assert flags[-1] == "stall_timeout_seconds"


def test_a_typo_is_told_before_what_is_missing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    with pytest.raises(UserError, match=r"unknown flag --embedings \(did you mean --embeddings\?\)"):
        load_recipe("evaluate").main(["--embedings", "x"])


def test_a_flag_of_the_launcher_stands_first(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ds-embed", "train-gpt", "--deepspeed", "zero2", "--num_gpus", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: --num_gpus: a flag of the launcher stands first: ds-embed train-gpt --num_gpus ...\n"
    )
