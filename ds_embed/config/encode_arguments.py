"""Encoding a corpus with a trained or a base model."""

from dataclasses import dataclass

from ds_embed.config.checks import above_zero, existing_files
from ds_embed.config.fields import setting
from ds_embed.config.job_arguments import JobArguments


@dataclass
class EncodeArguments(JobArguments):
    """Texts to encode. What decides a vector comes from the model's card; a flag is needed for base models only."""

    adapter_path: str | None = setting("run or PEFT folder whose LoRA adapter goes on the base model", default=None)
    deepspeed: str | None = setting(
        "path of a DeepSpeed JSON; with ZeRO-3 no GPU holds the whole model (default: each rank holds it)",
        default=None,
    )
    bf16: bool = setting("bfloat16 weights and activations; false computes in float32", default=True)
    query_files: list[str] = setting("JSON or JSONL files of queries: query, query_id", default_factory=list)
    doc_files: list[str] = setting("JSON or JSONL files of documents: pos_doc, doc_id", default_factory=list)
    output_prefix: str = setting("folder that gets consumed_samplesX/", default="embeddings")
    micro_batch_tokens: int = setting("padded tokens per forward pass of one rank: sets the memory", default=16384)
    cache_dir: str = setting(
        "folder for prepared tokens, seen by all nodes and reused by later runs", default="~/.cache/ds_embed"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.query_files and not self.doc_files:
            raise ValueError("nothing to encode: give --query_files, --doc_files or both")
        for name in ("query_files", "doc_files"):
            if getattr(self, name):
                existing_files(name, getattr(self, name))
        above_zero(self, "micro_batch_tokens")
