"""The words and numbers of a report's head: what was trained, and what came of it."""

from pathlib import Path

import numpy as np

from ds_embed.tools.report.run_log import RunLog

Rows = list[tuple[str, ...]]


def what_was_trained(run: RunLog) -> Rows:
    """(name, value) of the settings that say what a run is; one that the run does not know is left out."""
    config = run.config

    def known(template: str, *keys: str) -> str | None:
        return None if any(config.get(key) is None for key in keys) else template.format(*map(config.get, keys))

    modules = " ".join(config.get("lora_target_modules", []))
    weights = known(f"LoRA of rank {{}} on {modules}", "lora_rank") if config.get("lora_rank") else "all"
    if run.num_trained_weights:
        weights = f"{weights}: {run.num_trained_weights:,} parameters"
    steps = f"{run.train[-1]['step']:,}"
    if (planned := run.state.get("max_steps") or config.get("max_steps")) and planned > 0:
        steps = f"{steps} of {planned:,}"
    stage = run.deepspeed.get("zero_optimization", {}).get("stage", 0)
    precision = "bfloat16" if run.deepspeed.get("bf16", {}).get("enabled") else "float32"
    rows = [
        ("Base model", known("{}", "model_name_or_path")),
        ("Trained weights", weights),
        ("Steps", steps),
        ("Batch", known("{:,} queries; hard negatives of each: {}", "global_batch_size", "hard_negatives")),
        ("Samples", f"{run.train[-1].get('consumed_samples', 0):,}"),
        ("Ranks and ZeRO", run.state.get("written_by") or f"ZeRO-{stage}"),
        ("Precision", precision),
        ("Negatives", known("{}", "negatives")),
        ("Temperature", _temperature(run)),
        ("Learning rate", known("{:g}, {}, {} warm-up steps", "learning_rate", "lr_scheduler", "warmup_steps")),
        ("Micro-batch", known("{:,} tokens", "micro_batch_tokens")),
        ("Gradient caching", known("{}", "grad_cache") and ("on" if config["grad_cache"] else "off")),
        ("Training files", "\n".join(config.get("train_files", [])) or None),
        ("Seed", known("{}", "seed")),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _temperature(run: RunLog) -> str | None:
    values = run.series("temperature")[1]
    if not len(values):
        return None if run.config.get("temperature") is None else f"{run.config['temperature']:g}"
    return f"{values[0]:g}" if len(set(values.tolist())) == 1 else f"learned: {values[0]:.4g} to {values[-1]:.4g}"


def what_came_of_it(run: RunLog) -> Rows:
    """(name, value) of a run's figures; the last ones are means over the last tenth of the logged steps."""
    rows: Rows = []
    tail = max(1, len(run.train) // 10)
    for key, name, form in (
        ("loss", "Loss", "{:.4g}"),
        ("accuracy", "Accuracy in the batch", "{:.1%}"),
        ("positive_similarity", "Cosine, right document", "{:.3f}"),
        ("negative_similarity", "Cosine, hardest negative", "{:.3f}"),
    ):
        values = run.series(key)[1]
        if len(values):
            rows.append((name, f"{form.format(values[:tail].mean())} → {form.format(values[-tail:].mean())}"))
    for key in ("val_loss", "val_accuracy", *run.measures):
        steps, values = run.series(key, run.validation)
        if len(values):
            best = values.argmin() if key == "val_loss" else values.argmax()
            name = f"Validation {key.removeprefix('val_')}"
            before = "" if values[best] == values[-1] else f", best {values[best]:.4f} (step {steps[best]:,})"
            rows.append((name, f"{values[-1]:.4f}{before}"))
    for key, name, form in (
        ("tokens_per_second", "Real tokens per second, median", "{:,.0f}"),
        ("seconds", "Seconds per step, median", "{:.3g}"),
        ("padding_share", "Padding, median", "{:.1%}"),
    ):
        values = run.series(key)[1]
        if len(values):
            rows.append((name, form.format(np.median(values))))
    seconds = run.series("seconds")[1]
    if len(seconds):
        # Where not every step is logged, the logged ones stand for the others.
        rows.append(("Time in steps", duration(float(seconds.mean()) * run.train[-1]["step"])))
    if run.restarts:
        rows.append(("Restarted at step", ", ".join(f"{step:,}" for step in run.restarts)))
    skipped = max((line.get("skipped_steps", 0) for line in run.train), default=0)
    if skipped:
        rows.append(("Skipped steps", f"{skipped:,} (loss or gradient not finite)"))
    return rows


def duration(seconds: float) -> str:
    """Seconds as people say them: 41 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def model_name(run: RunLog) -> str:
    return Path(str(run.config.get("model_name_or_path", "model"))).name
