"""Measuring a model on benchmarks."""

from dataclasses import dataclass
from pathlib import Path

from ds_embed.settings.data_arguments import unescape
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting
from ds_embed.settings.job_arguments import JobArguments

INSTRUCTION = "{instruction}"


@dataclass(kw_only=True)
class BenchmarkArguments(JobArguments):
    output_dir: str = setting("folder for the results of any number of models; finished tasks are not measured again")
    tasks: list[str] = setting(
        "names of mteb tasks (SciFact) and benchmarks (NanoBEIR, 'MTEB(eng, v2)'), and paths of BEIR folders (with "
        "corpus.jsonl, queries.jsonl, qrels/)",
        default_factory=list,
    )
    split: str = setting("split of a BEIR folder to measure: qrels/SPLIT.tsv", default="test")
    query_files: list[str] = setting(
        "queries of an additional task of your own; doc_id is the relevant document unless --qrels is given",
        default_factory=list,
        files=True,
    )
    doc_files: list[str] = setting("the documents of query_files", default_factory=list, files=True)
    qrels: str | None = setting("judgments of query_files, as recipes/evaluate.py reads them", default=None)
    task_name: str = setting("name of the task made of query_files", default="own")
    ignore_identical_ids: bool = setting(
        "in BEIR folders and your own files, ignore the document that has the same id as the query", default=False
    )
    prompts: list[str] = setting(
        r"KEY=TEXT: text put in front of a task's texts (\n is a line break); KEY is a task name or a task type of mteb "
        "(STS, Retrieval), optionally followed by -query or -document, or just query or document (default: from the "
        "model's own files, else its query and document prefixes)",
        default_factory=list,
    )
    instruction_template: str | None = setting(
        rf"for tasks without a prompt, text in front of queries with mteb's own instruction in it, such as 'Instruct: "
        rf"{INSTRUCTION}\nQuery: ' (default: the model's prefix)",
        default=None,
    )
    bf16: bool = setting("bfloat16 weights and activations; false computes in float32", default=True)
    micro_batch_tokens: int = setting(
        "padded tokens per forward pass of one rank; determines memory use", default=16384, above=0
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks and not self.query_files:
            raise UserError("nothing to measure: give --tasks, or --query_files and --doc_files")
        for name, other in (("query_files", "doc_files"), ("doc_files", "query_files")):
            if getattr(self, name) and not getattr(self, other):
                raise UserError(f"--{name}: a task needs queries and documents; give --{other} too")
        if self.qrels is not None and not self.query_files:
            raise UserError(f"--qrels {self.qrels}: has no effect without --query_files; BEIR folders have their own")
        if Path(self.task_name).name != self.task_name or not self.task_name:
            raise UserError(f"--task_name {self.task_name}: is used as a file name, so it can't contain a /")
        if self.instruction_template is not None:
            self.instruction_template = unescape(self.instruction_template)
            if INSTRUCTION not in self.instruction_template:
                raise UserError(
                    f"--instruction_template '{self.instruction_template}': must contain {INSTRUCTION}, the placeholder "
                    "for mteb's instruction"
                )
        for word in self.prompts:
            if "=" not in word:
                raise UserError(f"--prompts {word}: expected KEY=TEXT, such as STS='Retrieve similar text: '")

    @property
    def prompts_by_key(self) -> dict[str, str]:
        pairs = (word.partition("=") for word in self.prompts)
        return {key: unescape(text) for key, _, text in pairs}
