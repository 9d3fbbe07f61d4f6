"""Does training on scored pairs and labelled texts improve a model, and as much as the peer's training does?

    python benchmarks/graded_pairs.py --model_name_or_path all-MiniLM-L6-v2 --sick sick --banking banking77 --output_dir graded

For each seed, recipes/train_bert.py and sentence-transformers' CoSENTLoss train the model on SICK_train.txt with equal
batch size, rate, schedule and steps, both in bfloat16; the measure is Spearman's correlation on
SICK_test_annotated.txt. Then ours trains it on Banking77's train.csv; the measure is the share of questions in test.csv
whose nearest question in train.csv has the same intent. All vectors are float32. Prints a table and writes
results.json. Needs `pip install -e .[benchmark]`.
"""

import csv
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contest import REPOSITORY, launcher
from recovery import run

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import Settings, setting

SICK = {"query": "sentence_A", "pos_doc": "sentence_B", "score": "relatedness_score"}


@dataclass
class GradedArguments(Settings):
    model_name_or_path: str = setting("BERT-family model with a mean of its tokens, folder or hub name")
    sick: str = setting("folder with SICK_train.txt and SICK_test_annotated.txt", files=True)
    banking: str = setting("folder with train.csv and test.csv", files=True)
    output_dir: str = setting("folder for models and results.json")
    seeds: list[int] = setting("seeds of the order of data", default_factory=lambda: [0, 1, 2])
    max_steps: int = setting("optimizer steps", default=100)
    global_batch_size: int = setting("pairs or texts per step", default=32)
    learning_rate: float = setting("peak learning rate; linear decay", default=2e-5)
    warmup_steps: int = setting("steps of linear rise", default=10)
    max_length: int = setting("longest text in tokens", default=64)


def train_ours(settings: GradedArguments, seed: int, folder: Path, files: Sequence[str | Path], *flags: object) -> Path:
    """Train on one rank with one thread; return the run."""
    names = ("model_name_or_path", "max_steps", "global_batch_size", "learning_rate", "warmup_steps", "max_length")
    words = [word for name in names for word in (f"--{name}", getattr(settings, name))]
    words += ["--deepspeed", "zero1", "--train_files", *files, "--output_dir", folder, "--seed", seed, *flags]
    words += ["--query_prefix", "", "--doc_prefix", "", "--lr_scheduler", "linear", "--adam_beta2", 0.999]
    words += ["--cache_dir", folder.parent / "cache", "--report_to", "none"]
    run(*launcher(1), REPOSITORY / "recipes" / "train_bert.py", *words, threads=1)
    return folder


def train_theirs(settings: GradedArguments, seed: int, folder: Path) -> Path:
    run(sys.executable, __file__, "--peer", seed, folder, json.dumps(settings.__dict__), threads=1)
    return folder / "model"


def peer(seed: str, folder: str, settings_text: str) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as TrainingArguments
    from sentence_transformers.losses import CoSENTLoss

    settings = GradedArguments(**json.loads(settings_text))
    model = SentenceTransformer(settings.model_name_or_path, device="cpu")
    model.max_seq_length = settings.max_length
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.global_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.01,
        seed=int(seed),
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    first, second, scores = zip(*read_sick(Path(settings.sick) / "SICK_train.txt"))
    data = Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=CoSENTLoss(model)).train()
    model.save(str(Path(folder) / "model"))


def read_sick(path: Path) -> list[tuple[str, str, float]]:
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[SICK["query"]], row[SICK["pos_doc"]], float(row[SICK["score"]])) for row in rows]


def embedder(model: str | Path):
    from ds_embed.vectors.embedder import Embedder

    return Embedder.from_pretrained(str(model), dtype="float32", normalize=True, query_prefix="", doc_prefix="")


def spearman(settings: GradedArguments, model: str | Path) -> float:
    from scipy.stats import spearmanr

    first, second, scores = zip(*read_sick(Path(settings.sick) / "SICK_test_annotated.txt"))
    encode = embedder(model).encode_queries
    return float(spearmanr((encode(first) * encode(second)).sum(1), scores).statistic)


def nearest_accuracy(settings: GradedArguments, model: str | Path) -> float:
    import numpy as np

    texts, intents = {}, {}
    for split in ("train", "test"):
        with open(Path(settings.banking) / f"{split}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        texts[split], intents[split] = [row["text"] for row in rows], np.array([row["category"] for row in rows])
    encode = embedder(model).encode_queries
    nearest = (encode(texts["test"]) @ encode(texts["train"]).T).argmax(1)
    return float((intents["train"][nearest] == intents["test"]).mean())


def main() -> None:
    (settings,) = parse_arguments(GradedArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True)
    pairs = output / "sick_train.tsv"  # the suffix determines the format
    shutil.copyfile(Path(settings.sick) / "SICK_train.txt", pairs)
    columns = [f"{key}={column}" for key, column in SICK.items()]
    base = settings.model_name_or_path
    results = {"SICK, before": [spearman(settings, base)], "Banking77, before": [nearest_accuracy(settings, base)]}
    for seed in settings.seeds:
        ours = train_ours(
            settings, seed, output / f"sick-{seed}", [pairs], "--pair_loss", "cosent", "--columns", *columns
        )
        results.setdefault("SICK, ds_embed", []).append(spearman(settings, ours))
        theirs = train_theirs(settings, seed, output / f"sick-theirs-{seed}")
        results.setdefault("SICK, sentence-transformers", []).append(spearman(settings, theirs))
        labels = Path(settings.banking) / "train.csv"
        ours = train_ours(settings, seed, output / f"banking-{seed}", [labels], "--columns", "label=category")
        results.setdefault("Banking77, ds_embed", []).append(nearest_accuracy(settings, ours))
        (output / "results.json").write_text(
            json.dumps({"settings": settings.__dict__, "results": results}, indent=2) + "\n"
        )
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.4f}" for name, values in results.items()), flush=True)
    for name, values in results.items():
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name:<30} {statistics.mean(values):.4f}{spread}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:])
    else:
        main()
