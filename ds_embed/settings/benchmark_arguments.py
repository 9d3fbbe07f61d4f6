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
    output_dir: str = setting("folder for the results, of any number of models; what is there is not measured again")
    tasks: list[str] = setting(
        "tasks (SciFact) and benchmarks (NanoBEIR, 'MTEB(eng, v2)') of mteb by name, and BEIR folders by path: "
        "corpus.jsonl, queries.jsonl, qrels/",
        default_factory=list,
    )
    split: str = setting("which qrels/SPLIT.tsv of a BEIR folder is measured", default="test")
    query_files: list[str] = setting(
        "own files as a further task: queries, whose doc_id is the right document unless --qrels is given",
        default_factory=list,
        files=True,
    )
    doc_files: list[str] = setting("the documents of query_files", default_factory=list, files=True)
    qrels: str | None = setting("judgments of query_files, as recipes/evaluate.py reads them", default=None)
    task_name: str = setting("name of the task that query_files make", default="own")
    ignore_identical_ids: bool = setting(
        "in folders and own files, leave out the document whose id is the query's own", default=False
    )
    prompts: list[str] = setting(
        r"KEY=TEXT: text in front of a task's texts, \n a new line; KEY is a task's name or mteb's type (STS, Retrieval), "
        "alone or with -query or -document behind it, or query or document (default: as the model's own files say, "
        "else its prefixes of queries and documents)",
        default_factory=list,
    )
    instruction_template: str | None = setting(
        rf"where no prompt has a task's name or type, mteb's own instruction in front of queries, such as 'Instruct: "
        rf"{INSTRUCTION}\nQuery: ' (default: the model's prefix)",
        default=None,
    )
    bf16: bool = setting("bfloat16 weights and activations; false computes in float32", default=True)
    micro_batch_tokens: int = setting(
        "padded tokens per forward pass of one rank: sets the memory", default=16384, above=0
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
            raise UserError(f"--task_name {self.task_name}: names a file, so it can't hold a /")
        if self.instruction_template is not None:
            self.instruction_template = unescape(self.instruction_template)
            if INSTRUCTION not in self.instruction_template:
                raise UserError(
                    f"--instruction_template '{self.instruction_template}': {INSTRUCTION}, where mteb's instruction "
                    "is to stand, is missing"
                )
        for word in self.prompts:
            if "=" not in word:
                raise UserError(f"--prompts {word}: want KEY=TEXT, such as STS='Retrieve similar text: '")

    @property
    def prompts_by_key(self) -> dict[str, str]:
        pairs = (word.partition("=") for word in self.prompts)
        return {key: unescape(text) for key, _, text in pairs}
