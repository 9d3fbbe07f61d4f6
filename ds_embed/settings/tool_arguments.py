"""The settings of the tools: approximate search, mining, reranking, benchmarks, reports, exports, sizing a job."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ds_embed.settings.data_arguments import DataArguments, TextArguments, unescape
from ds_embed.settings.encode_arguments import EncodeArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, listed, optional, same_as, setting, several
from ds_embed.settings.model_arguments import ModelArguments
from ds_embed.settings.run_arguments import JobArguments

INDEX_KINDS = ("flat", "hnsw", "ivf")


@dataclass
class IndexArguments(Settings):
    """Parameters of FAISS indexes; the search parameters may change from one search to the next."""

    hnsw_links: int = setting(
        "HNSW's M: links per document and layer; more raise recall and memory", 32, at_least=2, needs="index hnsw"
    )
    hnsw_ef_construction: int = setting(
        "HNSW: candidates considered when a document is added", 200, above=0, needs="index hnsw"
    )
    hnsw_ef_search: int = setting(
        "HNSW: candidates considered per query, at least top_k", 128, above=0, needs="index hnsw|index_file"
    )
    ivf_lists: int = setting(
        "IVF's nlist: number of cells; 0 chooses 4 sqrt(documents), but at least 39 documents per cell",
        0,
        at_least=0,
        needs="index ivf",
    )
    ivf_probes: int = setting("IVF's nprobe: cells searched per query", 16, above=0, needs="index ivf|index_file")


@dataclass
class SearchIndexArguments(IndexArguments):
    """What is searched: all documents exactly, a new index, or an index read from a file."""

    index: str = setting(
        f"exact, or a FAISS index built for this search: {', '.join(INDEX_KINDS)} (flat is exact in float32)",
        "exact",
        choices=("exact", *INDEX_KINDS),
    )
    index_file: str | None = optional(
        "file with a FAISS index of these documents, written by ds-embed build-index; replaces index"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.index_file is not None and self.index != "exact":
            raise UserError(
                f"--index_file and --index {self.index}: give only one; the file determines the kind of index"
            )

    @property
    def is_exact(self) -> bool:
        return self.index_file is None and self.index == "exact"


METHODS = ("model", "bm25")


# BM25, and vectors that were written before, need no model.
MINING_DEFAULTS = {"model_name_or_path": ""}


@dataclass(kw_only=True)
class MiningArguments(Settings):
    train_files: list[str] = setting("training files whose records get negatives, in any training format", files=True)
    columns: list[str] = several("mapping of our keys to those of the training files, as in training")
    corpus_files: list[str] = same_as(DataArguments, "corpus_files")
    output_file: str = setting("JSONL file for the records, in order, with neg_doc, pos_score and neg_scores")
    work_dir: str | None = optional(
        "folder for work in progress, visible to all nodes, removed at the end (default: output_file + .work)"
    )
    method: str = setting("candidates by the model's vectors (model) or by BM25 (bm25)", "model", choices=METHODS)
    embeddings: str | None = optional(
        "folder OUT/consumed_samplesX with vectors for the records' query_id and doc_id, instead of a model"
    )
    doc_files: list[str] = several(
        "files of the documents to choose from (default: the pos_doc of all training records)", files=True
    )
    include_neg_docs: bool = setting("also choose from the neg_doc of the training records", False)
    num_negatives: int = setting("negatives mined per record", 4, above=0)
    range_min: int = setting("number of top candidates to skip, after the margin and score rules", 0, at_least=0)
    range_max: int | None = optional(
        "candidates per query: its highest-scoring documents except its positives (default: range_min + 10 "
        "num_negatives)"
    )
    absolute_margin: float | None = optional(
        "a negative must score at least this much below the positive, in units of the score", at_least=0
    )
    relative_margin: float | None = optional(
        "a negative must score below the positive by at least this fraction of the positive's absolute score; 0.05 is "
        "NV-Retriever's TopK-PercPos with 95 percent (default: no margin)",
        at_least=0,
    )
    max_score: float | None = optional("highest score of a negative")
    min_score: float | None = optional("lowest score of a negative")
    match_positives: str = setting(
        "when two texts count as the same document: normalized (equal up to case, white space and Unicode "
        "normalization) or exact",
        "normalized",
        choices=("normalized", "exact"),
    )
    sampling: str = setting(
        "which of the remaining candidates are taken: top (the best) or random", "top", choices=("top", "random")
    )
    seed: int = setting("seed of --sampling random", 42, needs="sampling random")
    keep_existing: bool = setting("append the mined negatives to a record's own neg_doc instead of replacing it", False)
    drop_without_negatives: bool = setting("drop records that end up without a negative", False)
    cross_encoder: str | None = optional(
        "cross-encoder that rescores positives and candidates: a run of ds-embed train-reranker, or the folder or hub "
        "name of a sequence classifier with 1 or 2 labels"
    )
    cross_encoder_max_length: int | None = optional(
        "maximum pair length for the cross-encoder in tokens (default: as in its training, else what it supports, at most "
        "512)",
        above=0,
        needs="cross_encoder",
    )
    cross_encoder_bf16: bool = setting(
        "run the cross-encoder in bfloat16, which gives scores of about 3 digits", False, needs="cross_encoder"
    )
    cross_encoder_template: str | None = optional(
        r"text around query and document, such as 'query: {query}\ndocument: {document}\nrelevant:' (default: as the "
        "cross-encoder's own files say; needed for a decoder without a chat template for pairs)",
        needs="cross_encoder",
    )
    cross_encoder_scores: str = setting(
        "logit (with 2 labels: the second minus the first) or probability (its sigmoid)",
        "logit",
        choices=("logit", "probability"),
        needs="cross_encoder",
    )
    bm25_k1: float = setting("BM25's k1: saturation of term frequency", 1.5, at_least=0, needs="method bm25")
    bm25_b: float = setting(
        "BM25's b: amount of length normalization", 0.75, at_least=0, at_most=1, needs="method bm25"
    )
    deepspeed: str | None = optional("DeepSpeed JSON for encoding (default: every rank holds the whole model)")
    bf16: bool = same_as(EncodeArguments, "bf16")
    micro_batch_tokens: int = same_as(EncodeArguments, "micro_batch_tokens")

    def __post_init__(self):
        super().__post_init__()
        if self.range_max is not None and self.range_max - self.range_min < self.num_negatives:
            raise UserError(
                f"--range_max {self.range_max}: with --range_min {self.range_min} this leaves too few candidates for "
                f"--num_negatives {self.num_negatives}; raise it to at least {self.range_min + self.num_negatives}"
            )
        if self.method == "bm25" and self.embeddings is not None:
            raise UserError("--method bm25: uses no vectors; remove --embeddings, or choose --method model")
        if self.include_neg_docs and self.embeddings is not None:
            raise UserError(
                "--include_neg_docs true: a neg_doc has no id by which its vector could be found in --embeddings"
            )
        if Path(self.output_file).is_dir():
            raise UserError(f"--output_file {self.output_file}: is a folder; give a file name")

    @property
    def num_candidates(self) -> int:
        """Documents in a query's pool."""
        return self.range_min + 10 * self.num_negatives if self.range_max is None else self.range_max

    def check_model(self, model: ModelArguments, text: TextArguments) -> None:
        """Raise UserError if the model is missing, or it or what tells how it encodes is given where nothing is encoded."""
        if self.method == "model" and (self.embeddings is None) == (not model.model_name_or_path):
            raise UserError("--method model: give either --model_name_or_path or --embeddings")
        if self.method == "bm25" and model.model_name_or_path:
            raise UserError("--method bm25: uses no model; remove --model_name_or_path, or choose --method model")
        if not model.model_name_or_path:
            unused = {**asdict(replace(model, model_name_or_path="")), **asdict(text), "deepspeed": self.deepspeed}
            for name, value in unused.items():
                if value:
                    raise UserError(f"--{name} {listed(value)}: has no effect without --model_name_or_path; remove it")


@dataclass(kw_only=True)
class RerankArguments(JobArguments):
    model_name_or_path: str = setting(
        "run of ds-embed train-reranker, or folder or hub name of a sequence classifier with 1 or 2 labels"
    )
    run_file: str | None = optional("TREC run file whose documents are reranked", files=True)
    embeddings: str | None = optional(
        "folder OUT/consumed_samplesX written by ds-embed generate; exact search in it gives the documents to rerank, "
        "instead of run_file"
    )
    query_files: list[str] = setting("files with the texts of the queries", files=True)
    doc_files: list[str] = setting("files with the texts of the documents", files=True)
    output_file: str = setting("TREC run file to write; must not exist")
    top_k: int = setting("number of documents per query to rerank and write", 100, above=0)
    max_length: int | None = optional(
        "maximum pair length in tokens (default: as in training, else what the model supports, at most 512)", above=0
    )
    template: str | None = same_as(MiningArguments, "cross_encoder_template")
    bf16: bool = setting("compute in bfloat16, which gives scores of about 3 digits; false computes in float32", False)
    micro_batch_tokens: int = same_as(EncodeArguments, "micro_batch_tokens")

    def __post_init__(self):
        super().__post_init__()
        if (self.run_file is None) == (self.embeddings is None):
            raise UserError("give either --run_file or --embeddings, to say what is reranked")


INSTRUCTION = "{instruction}"


@dataclass(kw_only=True)
class BenchmarkArguments(JobArguments):
    output_dir: str = setting("folder for the results of any number of models; finished tasks are not measured again")
    tasks: list[str] = several(
        "names of mteb tasks (SciFact) and benchmarks (NanoBEIR, 'MTEB(eng, v2)'), and paths of BEIR folders (with "
        "corpus.jsonl, queries.jsonl, qrels/)"
    )
    split: str = setting("split of a BEIR folder to measure: qrels/SPLIT.tsv", "test")
    query_files: list[str] = several(
        "queries of an additional task of your own; doc_id is the relevant document unless --qrels is given", files=True
    )
    doc_files: list[str] = several("the documents of query_files", files=True)
    qrels: str | None = optional("judgments of query_files, as ds-embed evaluate reads them", files=True)
    task_name: str = setting("name of the task made of query_files", "own", needs="query_files")
    ignore_identical_ids: bool = setting(
        "in BEIR folders and your own files, ignore the document that has the same id as the query", False
    )
    prompts: list[str] = several(
        r"KEY=TEXT: text put in front of a task's texts (\n is a line break); KEY is a task name or a task type of mteb "
        "(STS, Retrieval), optionally followed by -query or -document, or just query or document (default: from the "
        "model's own files, else its query and document prefixes)"
    )
    instruction_template: str | None = optional(
        rf"for tasks without a prompt, text in front of queries with mteb's own instruction in it, such as 'Instruct: "
        rf"{INSTRUCTION}\nQuery: ' (default: the model's prefix)"
    )
    bf16: bool = same_as(EncodeArguments, "bf16")
    micro_batch_tokens: int = same_as(EncodeArguments, "micro_batch_tokens")

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


@dataclass
class ReportArguments(Settings):
    """What to report, and from which vectors. Without vectors the page shows only the curves."""

    run: str = setting("the --output_dir of a training run, finished or not; as the first argument it needs no flag")
    output_dir: str | None = optional("folder for report.html and the charts (default: RUN/report)")
    compare: str | None = optional("another run, whose curves are drawn in the same charts")
    embeddings: str | None = optional(
        "folder OUT/consumed_samplesX with test_queries and test_docs (default: the newest in RUN/validation)"
    )
    query_files: list[str] = several(
        "query texts and, without --qrels, their relevant documents (default: the run's val_query_files)", files=True
    )
    doc_files: list[str] = several("document texts (default: the run's val_doc_files)", files=True)
    qrels: str | None = optional("judgments: TREC qrels, a BEIR tsv, or JSON lines with query_id, doc_id and score")
    ignore_identical_ids: bool | None = optional(
        "ignore the document that has the same id as the query (default: as in the run's validation)"
    )
    worst_queries: int = setting("number of failed queries shown with their texts", 20, at_least=0)
    show_characters: int = setting("characters of each text shown", 300, above=0)
    map: str = setting(
        "projection of the documents to two dimensions: pca, or tsne (needs scikit-learn)",
        "pca",
        choices=("pca", "tsne"),
    )
    map_documents: int = setting("maximum number of documents on the map, sampled at random", 2000, at_least=3)
    seed: int = setting("seed of the random samples", 42, at_least=0)


@dataclass
class ExportArguments(Settings):
    output_dir: str = setting("folder to write; must be empty or not exist")
    run: str | None = optional(
        "folder of a run, its model/, or one of its checkpoints; of a reranker, its run or model/"
    )
    average: list[str] = several(
        "runs or checkpoints, with the same base model, pooling and prefixes, whose mean is written as a whole model"
    )
    weights: list[float] = several("weight of each run in average (default: equal weights)")
    step: int | None = optional("export the run's checkpoint of this step instead of its model/")
    format: str = setting(
        "adapter, merged or sentence-transformers",
        "sentence-transformers",
        choices=("adapter", "merged", "sentence-transformers"),
    )
    dtype: str = setting(
        "data type of the weights of a whole model on disk: auto (the base model's), float32, bfloat16 or float16",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("where the checks run, in float32: cpu or cuda", "cpu")
    trust_remote_code: bool = setting("run Python code shipped with the model", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.run is None) == (not self.average):
            raise UserError("give either --run RUN, or --average RUN1 RUN2 ... for the mean of several runs")
        if len(self.average) == 1:
            raise UserError(f"--average {self.average[0]}: give at least two runs, or use --run for one")
        if self.average and self.step is not None:
            raise UserError(f"--step {self.step}: has no effect with --average; give it checkpoint folders")
        if self.weights and not self.average:
            raise UserError("--weights: has no effect without --average")
        if self.average and self.format == "adapter":
            raise UserError(
                "--format adapter: the mean of runs is a whole model; choose merged or sentence-transformers"
            )
        if self.format == "adapter" and self.dtype != "auto":
            raise UserError(f"--dtype {self.dtype}: an adapter is copied unchanged; remove the flag")


@dataclass
class HardwareArguments(Settings):
    """What the hardware can do. Only the predicted times depend on settings other than gpu_memory_gb."""

    gpu_memory_gb: float | None = optional(
        "memory of one GPU in GiB, as nvidia-smi shows it (default: that of the local GPU, else 80; for CPU ranks, "
        "their share of the machine's memory)",
        above=0,
        needs="dry_run",
    )
    gpu_tflops: float = setting(
        "peak dense throughput of a GPU in 10^12 FLOP/s, in the precision used", 989.0, above=0, needs="dry_run"
    )
    efficiency: float = setting("fraction of gpu_tflops that is achieved", 0.41, above=0, at_most=1, needs="dry_run")
    node_gb_per_second: float = setting(
        "bandwidth from one GPU to the others of its node, in 10^9 bytes per second", 450.0, above=0, needs="dry_run"
    )
    network_gb_per_second: float = setting(
        "bandwidth from one node to the others, over all its network cards, in 10^9 bytes per second",
        50.0,
        above=0,
        needs="dry_run",
    )


@dataclass
class DryRunArguments(HardwareArguments):
    """For --dry_run true only."""

    dry_run: bool = setting(
        "check every setting, tokenize the data, print the memory and time that the job will need, and exit before the "
        "model is loaded",
        False,
    )


@dataclass
class SizingArguments(HardwareArguments):
    num_gpus: int = setting("number of GPUs of the job, over all nodes", 8, at_least=1)
    gpus_per_node: int = setting("number of GPUs per node", 8, at_least=1)
    num_records: int | None = optional("number of training records, if train_files is not given", at_least=1)
    mean_query_tokens: int = setting("mean tokens per query, if train_files is not given", 32, at_least=1)
    mean_doc_tokens: int = setting("mean tokens per document, if train_files is not given", 128, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise UserError(f"--num_gpus {self.num_gpus}: must be a multiple of --gpus_per_node {self.gpus_per_node}")


# Defaults of recipes/plan.py: it accepts the flags of a training command, but its files need not exist yet.
SIZING_DEFAULTS = {"train_files": [], "output_dir": "", "deepspeed": "ds_configs/zero2.json"}
