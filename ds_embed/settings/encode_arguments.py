"""Encoding a corpus with a trained or a base model."""

from dataclasses import dataclass

from ds_embed.settings.data_arguments import DataArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import check_column, optional, same_as, setting, several
from ds_embed.settings.run_arguments import JobArguments

# Changing these changes a row only by rounding.
ROUNDING_SETTINGS = ("micro_batch_tokens", "attn_implementation", "kernels")

VECTOR_DTYPES = ("float32", "float16", "int8")
_COLUMN_KEYS = ("query", "query_id", "prompt", "pos_doc", "doc_id", "title")


@dataclass
class EncodeArguments(JobArguments):
    """Texts to encode. Trained models bring their own pooling, prefixes and lengths; base models may need flags."""

    deepspeed: str | None = optional(
        "DeepSpeed JSON, a path or the name of a shipped one; with ZeRO-3 no GPU holds the whole model (default: every "
        "rank holds the whole model)"
    )
    bf16: bool = setting("bfloat16 weights and activations; false computes in float32", True)
    merge_adapter: bool = setting(
        "merge the LoRA matrices into the base weights in float32 before rounding to bfloat16; this makes encoding "
        "faster and changes the vectors by the amount that is printed; not under ZeRO-3",
        False,
    )
    query_files: list[str] = several("files of queries (query, query_id), given like train_files", files=True)
    doc_files: list[str] = several("files of documents (pos_doc, doc_id), given like train_files", files=True)
    columns: list[str] = several(
        "mapping of our keys (query, query_id, prompt, pos_doc, doc_id, title) to the keys or columns of the files, such as "
        "query=question or doc_id=number; one mapping for all files (default: detected from the keys)"
    )
    output_prefix: str = setting("folder in which consumed_samplesX/ is created", "embeddings")
    vector_dtype: str = setting(
        f"numbers of the vectors on disk: {', '.join(VECTOR_DTYPES)}; int8 rows have a float32 scale each, in a file "
        "beside them (query.scales.npy, doc.scales.npy); our commands read all three",
        "float32",
        choices=VECTOR_DTYPES,
    )
    micro_batch_tokens: int = setting(
        "tokens per forward pass of one rank, with padding where texts are padded; sets memory use", 16384, above=0
    )
    cache_dir: str = same_as(DataArguments, "cache_dir")
    save_seconds: float = setting(
        "seconds between saves of the encoded rows; a job that was killed resumes from the last save", 30.0, at_least=0
    )
    accept_changes: list[str] = several(
        "settings that may differ from those of the rows encoded so far, because they affect only rounding: "
        "micro_batch_tokens, attn_implementation, kernels (the machine's matrix multiplication, and varlen attention)"
    )
    num_shards: int = setting("number of shards of the rows, each encoded by a separate job", 1, above=0)
    shard_index: int | None = optional("index of the shard that this job encodes, from 0")
    merge_shards: bool = setting(
        "merge the finished shards of num_shards jobs and encode nothing; the other flags must be those of the jobs",
        False,
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.query_files and not self.doc_files:
            raise UserError("nothing to encode: give --query_files, --doc_files or both")
        for word in self.columns:
            check_column(word, _COLUMN_KEYS)
        for name in self.accept_changes:
            if name not in ROUNDING_SETTINGS:
                raise UserError(
                    f"--accept_changes {name}: only {', '.join(ROUNDING_SETTINGS)} may change, because they affect only "
                    "rounding; for any other change choose another --output_prefix"
                )
        if self.merge_shards and self.shard_index is not None:
            raise UserError("--merge_shards true: encodes no shard; leave out --shard_index")
        if self.merge_shards or self.shard_index is not None:
            if self.num_shards < 2:
                raise UserError(f"--num_shards {self.num_shards}: give the number of shards, 2 or more")
        elif self.num_shards > 1:
            raise UserError(
                f"--num_shards {self.num_shards}: give --shard_index 0 to {self.num_shards - 1}, or --merge_shards true "
                "after all shards are finished"
            )
        if self.shard_index is not None and not 0 <= self.shard_index < self.num_shards:
            raise UserError(f"--shard_index {self.shard_index}: must be from 0 to {self.num_shards - 1}")
