"""The step: the global batch and its loss."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, listed, optional, setting, several

NEGATIVES = ("all", "own", "hard", "pair")
DIRECTIONS = ("query_document", "document_query", "query_query", "document_document")
SCORED_LOSSES = ("cosent", "angle", "cosine")
DISTILLATION_LOSSES = ("kl", "margin_mse")
TEACHER_LOSSES = ("cosine", "mse", "scores")
# A learned temperature stops here: below, scores grow faster than the embeddings learn (Radford et al. 2021, sec. 2.5).
MIN_LEARNED_TEMPERATURE = 0.01


@dataclass
class StepArguments(Settings):
    global_batch_size: int = setting("queries per optimizer step, over all ranks", 64, above=0)
    micro_batch_tokens: int = setting(
        "tokens per forward pass of one rank, with padding where texts are padded; sets memory use", 4096, above=0
    )
    negatives: str = setting(
        "documents each query is scored against: all (every document of the batch), own (all positives and its own "
        "hard negatives), hard (its positive and its own hard negatives), pair (its positive and one of its own hard "
        "negatives at a time)",
        "all",
        choices=NEGATIVES,
    )
    negatives_per_file: list[str] = several(
        "negatives of each of train_files, where their queries are scored in different ways", choices=NEGATIVES
    )
    temperature_per_file: list[float] = several(
        "temperature of each of train_files, also of scored pairs; temperature is then that of validation alone",
        above=0,
    )
    temperature: float = setting("similarities are divided by this before the softmax", 0.02, above=0)
    learnable_temperature: bool = setting(
        f"train the temperature too, starting at temperature and never below {MIN_LEARNED_TEMPERATURE}", False
    )
    label_smoothing: float = setting(
        "share of the target probability spread over all candidates of a query", 0.0, at_least=0, below=1
    )
    symmetric: bool = setting("average the query-to-document loss and that of each positive against all queries", False)
    directions: list[str] = setting(
        "what the one softmax of each query and its positive holds: query_document (the query against documents, as in "
        "negatives), document_query (the positive against all other queries), query_query, document_document (queries "
        "against queries, positives against documents that aren't the query's own hard negatives); all four are GTE's loss",
        ["query_document"],
        choices=DIRECTIONS,
    )
    hardness_weight: float = setting(
        "alpha of EmbeddingGemma, which uses 5: in the softmax, each of a query's own hard negatives (no other documents "
        "of the batch) has the weight exp(alpha * cosine), through which no gradient runs",
        0.0,
        at_least=0,
    )
    false_negative_margin: float | None = optional(
        "ignore negatives whose cosine exceeds the positive's by more than this (default: none are ignored)",
        at_least=-2,
        at_most=2,
    )
    matryoshka_dims: list[int] = several(
        "numbers of leading dimensions that are trained as embeddings; must include the full dimension"
    )
    matryoshka_weights: list[float] = several("loss weight of each of matryoshka_dims (default: 1 each)", above=0)
    pair_loss: str | None = optional(
        "loss for training files of scored pairs (query, pos_doc, score): cosent or angle (similarities are ranked by "
        "score), cosine (the score is the target cosine); without it scores are not read",
        choices=SCORED_LOSSES,
    )
    pair_temperature: float = setting(
        "similarities of scored pairs are divided by this in cosent and angle",
        0.05,
        above=0,
        needs="pair_loss cosent angle",
    )
    distillation_weight: float = setting(
        "weight of distillation_loss, which learns a teacher's scores (pos_score and neg_scores of a record), in the loss",
        0.0,
        at_least=0,
    )
    distillation_loss: str = setting(
        "kl (KL divergence of the softmax over a query's positive and own hard negatives), margin_mse (mean squared "
        "difference between the student's and the teacher's margins, positive minus hard negative; the student's are of "
        "cosine / temperature, so set temperature and distillation_temperature to bring both to one scale)",
        "kl",
        choices=DISTILLATION_LOSSES,
        needs="distillation_weight",
    )
    distillation_temperature: float = setting(
        "the teacher's scores are divided by this", 1.0, above=0, needs="distillation_weight"
    )
    guide_embeddings: str | None = setting(
        "folder written by generate with another model's vectors of all training texts; negatives whose cosine in it is "
        "above the positive's minus guide_margin are ignored (GISTEmbed)",
        default=None,
        files=True,
    )
    guide_margin: float = setting("see guide_embeddings", default=0.0, at_least=-2, at_most=2, needs="guide_embeddings")
    guide_margin_strategy: str = setting(
        "meaning of guide_margin: a difference of cosines (absolute), or a fraction of the positive's cosine (relative)",
        default="absolute",
        choices=("absolute", "relative"),
        needs="guide_embeddings",
    )
    teacher_embeddings: str | None = setting(
        "folder like guide_embeddings, with vectors of a teacher model; teacher_loss is added to the loss. If the "
        "dimensions differ, a linear map is trained too and dropped at the end",
        default=None,
        files=True,
    )
    teacher_loss: str = setting(
        "cosine (1 - cosine of each text's vector and the teacher's), mse (squared distance of the two unit vectors), "
        "scores (KL divergence from the teacher's similarities of each query with the documents of the batch)",
        default="cosine",
        choices=TEACHER_LOSSES,
        needs="teacher_embeddings",
    )
    teacher_weight: float = setting("weight of teacher_loss", default=1.0, above=0, needs="teacher_embeddings")
    teacher_temperature: float | None = setting(
        "the teacher's cosines are divided by this before the softmax, for teacher_loss scores (default: temperature)",
        default=None,
        above=0,
        needs="teacher_loss scores",
    )
    grad_cache: bool = setting(
        "gradient caching: encode twice, so that any batch size fits in the memory of one micro-batch; gradients are exact",
        False,
    )
    gradient_checkpointing: bool = setting("recompute activations in the backward pass to save memory", False)

    def __post_init__(self):
        super().__post_init__()
        if self.learnable_temperature and self.temperature < MIN_LEARNED_TEMPERATURE:
            raise UserError(
                f"--temperature {self.temperature}: with --learnable_temperature true it must be at least "
                f"{MIN_LEARNED_TEMPERATURE}"
            )
        self._check_directions()
        if self.learnable_temperature and self.temperature_per_file:
            raise UserError(
                "--temperature_per_file: --learnable_temperature true learns one for all; give one of the two"
            )
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if len(set(dims)) < len(dims) or any(dim < 1 for dim in dims):
            raise UserError(f"--matryoshka_dims {listed(dims)}: must be distinct numbers of at least 1")
        if weights and len(weights) != len(dims):
            raise UserError(
                f"--matryoshka_weights {listed(weights)}: has {len(weights)} values, "
                f"but --matryoshka_dims has {len(dims)}"
            )

    def _check_directions(self) -> None:
        given = f"--directions {listed(self.directions)}"
        if "query_document" not in self.directions or len(set(self.directions)) < len(self.directions):
            raise UserError(
                f"{given}: must contain query_document, whose scores are those of the positives, and each name once"
            )
        if self.directions == ["query_document"]:
            return
        if self.symmetric:
            raise UserError(
                f"{given}: has one softmax, and --symmetric true averages two; leave out --symmetric, or --directions"
            )
        if "pair" in (self.negatives, *self.negatives_per_file):
            raise UserError(
                f"{given}: has no meaning with --negatives pair, which compares the positive with one hard negative at a "
                "time; set --negatives own or all"
            )
