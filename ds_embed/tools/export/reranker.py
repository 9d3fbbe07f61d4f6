"""A reranker's run as a folder for sentence-transformers: written under a hidden name, opened there, compared, then named."""

import importlib.util
import json
import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_embed.artifact.durable import folder_when_whole
from ds_embed.job.ranks import World
from ds_embed.models.card import CARD_NAME
from ds_embed.models.reranker import find_reranker, write_checkpoint
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import ExportArguments
from ds_embed.tools.export.check import check_texts, spelled_texts
from ds_embed.vectors.cross_encoder import CrossEncoder

MAX_DIFFERENCE = 1e-4  # of a score, in float32
# Of weights rounded to 16 bits, against the run in float32: this only finds numbers that 16 bits can't hold.
MIN_CORRELATION_ROUNDED = 0.95
_README = """---
library_name: sentence-transformers
pipeline_tag: text-ranking
tags: [reranker, cross-encoder]
---

# {name}

A reranker, trained with ds_embed from {base} on {samples:,} samples. It reads a query and a document together, at most
{length} tokens of a pair, and gives one score: a logit, larger for a better document.

With sentence-transformers:

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder({name!r})
print(model.predict([("a question", "a text"), ("a question", "another text")]))
```

With transformers alone:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForSequenceClassification.from_pretrained({name!r}, dtype=torch.float32).eval()
queries, documents = ["a question", "a question"], ["a text", "another text"]
inputs = tokenizer(queries, documents, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    print(model(**inputs).logits[:, 0])
```

With ds_embed: `ds-embed rerank --model_name_or_path {name}`, or `mine-negatives --cross_encoder {name}`.
"""


def export_reranker(arguments: ExportArguments, target: Path, checkpoint: Path | None) -> None:
    """Write the folder and print a line per check. UserError where CrossEncoder gives other scores; nothing is left then.

    checkpoint: what is to be exported, where it is not the run's last model.
    """
    run = arguments.run or ""
    if arguments.format == "adapter":
        raise UserError(f"--format adapter: {run} is a reranker, which is a whole model; choose sentence-transformers")
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            f"--format {arguments.format}: the package sentence-transformers is not installed, which checks a reranker; "
            "pip install sentence-transformers, or ds_embed as pip install -e '.[export]'"
        )
    if checkpoint is None:
        return _export(arguments, target, Path(find_reranker(run, flag="run").base))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        write_checkpoint(checkpoint, Path(folder), arguments.trust_remote_code)
        _export(arguments, target, Path(folder))


def _export(arguments: ExportArguments, target: Path, source: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    card = json.loads((source / CARD_NAME).read_text("utf-8"))
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype="auto")
    stored = model.dtype
    dtype = stored if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    tokenizer, length = AutoTokenizer.from_pretrained(source), card["pair_format"]["max_length"]
    texts = check_texts(tokenizer, (length // 2, length)) + spelled_texts(tokenizer)
    pairs = list(zip(texts, reversed(texts)))
    expected = _scores_here(source, pairs, arguments.device)
    with folder_when_whole(target) as folder:
        model.to(dtype).save_pretrained(folder)
        for file in source.iterdir():  # the tokenizer, which makes the pair, and the card
            if not (folder / file.name).exists() and not file.name.startswith(("model", "pytorch_model")):
                shutil.copyfile(file, folder / file.name)
        known = {"base": card["base_model"], "samples": card["consumed_samples"], "length": length}
        (folder / "README.md").write_text(_README.format(name=target.name, **known), "utf-8")
        del model
        if dtype not in (stored, torch.float32):
            rounded = _scores_here(folder, pairs, arguments.device)
            correlation = np.corrcoef(expected, rounded)[0, 1]
            name = str(dtype).removeprefix("torch.")
            if not correlation >= MIN_CORRELATION_ROUNDED:
                raise UserError(
                    f"--dtype {name}: such weights give other scores than the run (correlation {correlation:.3f}, must be "
                    f"at least {MIN_CORRELATION_ROUNDED}): nothing was written; --dtype float32 keeps them exact"
                )
            difference = np.abs(expected - rounded).max()
            print(
                f"checked weights rounded to {name}: correlation {correlation:.6f}, largest difference {difference:.1e}"
            )
            expected = rounded
        found = _scores_of_sentence_transformers(folder, pairs, arguments)
        difference = np.abs(found - expected).max()
        if not difference <= MAX_DIFFERENCE:
            raise UserError(
                f"CrossEncoder gives other scores than the run (largest difference {difference:.1e}, must be at most "
                f"{MAX_DIFFERENCE:.0e}): nothing was written"
            )
        told = f"largest difference {difference:.1e}, scores from {expected.min():.2f} to {expected.max():.2f}"
        print(f"checked CrossEncoder in float32: {len(pairs)} pairs, {told}")
    print(f"written to {target}")
    print(f'load it with CrossEncoder("{target}").predict([(query, document), ...]); README.md has more')


def _scores_here(folder: Path, pairs: list[tuple[str, str]], device: str) -> np.ndarray:
    world = replace(World.alone(), device=torch.device(device))
    return CrossEncoder(world, str(folder), flag="run", prefix="").score(pairs)


def _scores_of_sentence_transformers(folder: Path, pairs: list[Any], arguments: ExportArguments) -> np.ndarray:
    from sentence_transformers import CrossEncoder as Theirs

    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)  # it reports every load
    options: dict[str, Any] = {"device": arguments.device, "trust_remote_code": arguments.trust_remote_code}
    model = Theirs(str(folder), model_kwargs={"dtype": torch.float32}, **options)
    return np.asarray(model.predict(pairs, show_progress_bar=False), np.float32)
