"""Does a teacher help a small student? The first layers of a model learn from records, with and without its vectors.

    python benchmarks/distil.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl \
        --query_file squad/test_queries.jsonl --doc_file squad/test_docs.jsonl --output_dir distil

The teacher, which is the whole model, encodes the texts of the training records once. The student, its first num_layers
layers, is trained with equal settings and steps: on the records alone, with each teacher_loss in addition, and with the
teacher as a guide. Prints a table and writes results.json. When started again, it resumes.
"""

from dataclasses import dataclass
from pathlib import Path

from machine import keep_layers
from recovery import MEASURES, RecoveryArguments, launched, measure, summarise
from two_rounds import train

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import setting

TEACHER_LOSSES = ("cosine", "mse", "scores")


@dataclass
class DistilArguments(RecoveryArguments):
    num_layers: int = setting("first layers of the model that the student keeps", default=2)
    arms: list[str] = setting(
        "what is compared",
        default_factory=lambda: ["records", *TEACHER_LOSSES, "guide"],
        choices=("records", *TEACHER_LOSSES, "guide"),
    )
    teacher_weight: float = setting("weight of a teacher_loss", default=1.0)


def encode(settings: DistilArguments, folder: Path) -> Path:
    """Encode the texts of the training records with the teacher."""
    texts = folder / "texts"
    if not texts.exists():
        launched(
            settings,
            "convert.py",
            "--input_format",
            "training",
            "--output_format",
            "texts",
            "--input",
            settings.train_file,
            "--output",
            texts,
        )
    words = ["--query_files", texts / "queries.jsonl", "--doc_files", texts / "docs.jsonl", "--output_prefix", folder]
    words += ["--query_prefix", "", "--doc_prefix", "", "--pooling", "mean"]
    launched(
        settings,
        "generate.py",
        "--model_name_or_path",
        settings.model_name_or_path,
        *words,
        "--max_length",
        settings.doc_max_length,
    )
    return folder / "consumed_samples0"


def main() -> None:
    (settings,) = parse_arguments(DistilArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    student = output / "student"
    if not student.exists():
        keep_layers(settings.model_name_or_path, settings.num_layers, str(student))
    vectors = encode(settings, output / "teacher")
    results: dict[str, list[dict[str, float]]] = {}

    def add(name: str, seed: int | str, model: Path | str) -> None:
        metrics = measure(settings, model, output / f"vectors-{name}-{seed}")
        results.setdefault(name, []).append(metrics)
        print(f"{name:<22} {seed!s:>4} " + " ".join(f"{metrics[m]:8.4f}" for m in MEASURES), flush=True)

    print(f"{'model':<22} {'seed':>4} " + " ".join(f"{name:>8}" for name in MEASURES), flush=True)
    add("teacher", "-", settings.model_name_or_path)
    add("student", "-", student)
    taught = ["--teacher_embeddings", vectors, "--teacher_weight", settings.teacher_weight, "--teacher_loss"]
    for seed in settings.seeds:
        for arm in settings.arms:
            more = (
                [*taught, arm] if arm in TEACHER_LOSSES else ["--guide_embeddings", vectors] if arm == "guide" else []
            )
            add(
                arm, seed, train(settings, student, Path(settings.train_file), seed, output / f"{arm}-{seed}", 0, *more)
            )
    summarise(settings, results, output)


if __name__ == "__main__":
    main()
