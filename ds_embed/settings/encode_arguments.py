"""Encoding a corpus with a trained or a base model."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting
from ds_embed.settings.job_arguments import JobArguments

# Changes of these move a row by no more than rounding does.
ROUNDING_SETTINGS = ("micro_batch_tokens", "attn_implementation", "kernels")

_COLUMN_KEYS = ("query", "query_id", "pos_doc", "doc_id", "title")


@dataclass
class EncodeArguments(JobArguments):
    """Texts to encode. What decides a vector comes from the model's card; a flag is needed for base models only."""

    deepspeed: str | None = setting(
        "DeepSpeed JSON, by path or shipped name; with ZeRO-3 no GPU holds the whole model (default: each rank holds it)",
        default=None,
    )
    bf16: bool = setting("bfloat16 weights and activations; false computes in float32", default=True)
    merge_adapter: bool = setting(
        "add the LoRA matrices to the base's weights in float32 before they are rounded to bfloat16, which makes "
        "encoding faster and moves vectors by what is printed; not under ZeRO-3",
        default=False,
    )
    query_files: list[str] = setting(
        "files of queries: query, query_id; as train_files", default_factory=list, files=True
    )
    doc_files: list[str] = setting(
        "files of documents: pos_doc, doc_id; as train_files", default_factory=list, files=True
    )
    columns: list[str] = setting(
        "which key or column holds what, such as query=question or doc_id=number; for the keys query and query_id, "
        "and for pos_doc, doc_id and title (default: told by the keys)",
        default_factory=list,
    )
    output_prefix: str = setting("folder that gets consumed_samplesX/", default="embeddings")
    micro_batch_tokens: int = setting(
        "padded tokens per forward pass of one rank: sets the memory", default=16384, above=0
    )
    cache_dir: str = setting(
        "folder for prepared tokens, seen by all nodes and reused by later runs", default="~/.cache/ds_embed"
    )

    save_seconds: float = setting(
        "seconds between saves of the rows encoded so far; a job that was killed goes on from the last",
        default=30.0,
        at_least=0,
    )
    accept_changes: list[str] = setting(
        "what may differ from how the rows so far were encoded, since it changes rounding alone: micro_batch_tokens, "
        "attn_implementation, kernels (how the machine multiplies)",
        default_factory=list,
    )
    num_shards: int = setting("parts that the rows are cut into, each encoded by a job of its own", default=1, above=0)
    shard_index: int | None = setting("which of the num_shards parts this job encodes, from 0", default=None)
    merge_shards: bool = setting(
        "encode nothing and put the finished parts of num_shards jobs together; other flags as in those jobs",
        default=False,
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.query_files and not self.doc_files:
            raise UserError("nothing to encode: give --query_files, --doc_files or both")
        for word in self.columns:
            if word.partition("=")[0] not in _COLUMN_KEYS:
                raise UserError(f"--columns {word}: want KEY=COLUMN, where KEY is one of {', '.join(_COLUMN_KEYS)}")
        for name in self.accept_changes:
            if name not in ROUNDING_SETTINGS:
                raise UserError(
                    f"--accept_changes {name}: only {', '.join(ROUNDING_SETTINGS)} may change, which move a row by no "
                    "more than rounding; for another change choose another --output_prefix"
                )
        self._check_shards()

    def _check_shards(self) -> None:
        if self.merge_shards and self.shard_index is not None:
            raise UserError("--merge_shards true: encodes no shard; leave out --shard_index")
        if self.merge_shards or self.shard_index is not None:
            if self.num_shards < 2:
                raise UserError(f"--num_shards {self.num_shards}: give the number of shards, 2 or more")
        elif self.num_shards > 1:
            raise UserError(
                f"--num_shards {self.num_shards}: give --shard_index 0 to {self.num_shards - 1}, or --merge_shards true "
                "once all shards are finished"
            )
        if self.shard_index is not None and not 0 <= self.shard_index < self.num_shards:
            raise UserError(f"--shard_index {self.shard_index}: must be from 0 to {self.num_shards - 1}")
