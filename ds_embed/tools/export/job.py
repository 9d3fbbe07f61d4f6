"""A run as a folder for other libraries: written under a hidden name, loaded there, compared, then named."""

import importlib.util
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ds_embed.artifact.durable import folder_when_whole
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.checkpoint import checkpoint_in
from ds_embed.models.kinds import direction_in_config, kind_of, without_pooler
from ds_embed.models.loading import ModelSource, find_model, load_config
from ds_embed.models.lora import save_adapter
from ds_embed.models.reranker import is_reranker
from ds_embed.models.sentence_transformers import write_modules
from ds_embed.models.tokenizer import save_tokenizer, self_contained
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.data_arguments import TEXT_PLACE
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import ExportArguments
from ds_embed.tools.export import check
from ds_embed.tools.export.average import average, check_alike, shares_of
from ds_embed.tools.export.readme import is_plain, readme
from ds_embed.tools.export.reranker import export_reranker
from ds_embed.vectors.embedder import Embedder

_LOAD = {
    "adapter": 'PeftModel.from_pretrained(base, "{}")',
    "merged": 'AutoModel.from_pretrained("{}")',
    "sentence-transformers": 'SentenceTransformer("{}").encode_query([...]) and .encode_document([...])',
}


def export(arguments: ExportArguments) -> None:
    """Write --output_dir, which must be free, and print a line per check.

    UserError when the run can't be exported so, or when the library that the format is for gives other vectors; nothing
    is left then.
    """
    target = Path(arguments.output_dir).expanduser().resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--output_dir {arguments.output_dir}: exists and is not empty; choose another")
    checkpoint = None if arguments.run is None else checkpoint_in("run", arguments.run, arguments.step)
    if arguments.run is not None and is_reranker(checkpoint or arguments.run):
        return export_reranker(arguments, target, checkpoint)
    runs = arguments.average or [arguments.run]
    shares = shares_of(arguments.weights, len(runs))
    sources = [_find_run(run, arguments) for run in runs]
    check_alike(runs, sources)
    needs_modules = arguments.format == "sentence-transformers" or not is_plain(sources[0].card)
    if needs_modules and importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            f"--format {arguments.format}: the package sentence-transformers is not installed; "
            "pip install sentence-transformers, or ds_embed as pip install -e '.[export]'"
        )
    # transformers imports DeepSpeed, where there is one, while it saves: it would warn that it had to find out.
    os.environ.setdefault("DS_ACCELERATOR", torch.device(arguments.device).type)
    job = _Export(arguments, runs, sources, shares)
    with folder_when_whole(target) as folder:
        job.fill(folder, target.name)
    print(f"written to {target}")
    print("load it with " + _LOAD[arguments.format].format(target) + "; README.md has more")


def _find_run(run: str, arguments: ExportArguments) -> ModelSource:
    flag = "average" if arguments.average else "run"
    source = find_model(run, flag=flag, step=arguments.step)
    if source.card is None:
        raise UserError(f"--{flag} {run}: has no ds_embed.json, so it is no model that ds_embed has trained")
    for prefix in (source.card.query_prefix, source.card.doc_prefix):
        if TEXT_PLACE in prefix:
            raise UserError(
                f"--format {arguments.format}: this run's prefix {prefix!r} goes on behind the text, and other libraries only "
                "put something in front of it; use ds_embed.Embedder or ds-embed generate"
            )
    if arguments.format == "adapter" and not source.is_adapted:
        raise UserError(
            f"--format adapter: {run} was trained with all weights (--lora_rank 0) and has no adapter; "
            "choose --format merged or sentence-transformers"
        )
    return source


class _Export:
    """One export: the run in float32, what it gives for the check texts, and where the parts go."""

    def __init__(self, arguments: ExportArguments, names: list[str], sources: list[ModelSource], shares: list[float]):
        self.source = source = sources[0]
        self.card: EmbeddingCard = source.card
        if source.is_adapted:
            self.card = replace(source.card, base_model=source.base)
        if len(sources) > 1:
            most = max(one.card.consumed_samples for one in sources)
            self.card = replace(self.card, consumed_samples=most, temperature=None)
        self.output_format, self.device = arguments.format, arguments.device
        self.trust_remote_code = arguments.trust_remote_code
        self.config = load_config(source, self.trust_remote_code)
        self.direction: dict[str, bool] = {}  # what config.json has to say of a decoder made bidirectional
        if self.card.bidirectional and kind_of(self.config, self.trust_remote_code, source.base).is_causal:
            self.direction = self._find_direction()
        self.base_dtype = self.config.dtype or torch.float32
        self.dtype = self.base_dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        self.needs_merging = source.is_adapted and len(sources) == 1
        # Weights that are computed here are float32; others are what they were in the base's type too.
        is_computed = source.is_adapted or len(sources) > 1
        self.is_exact = self.dtype == torch.float32 or (not is_computed and self.dtype == self.base_dtype)
        self.run = self._embedder(source) if len(sources) == 1 else average(names, sources, shares, self._embedder)
        self.tokenizer = self_contained(self.run.tokenizer, self.card)
        self.texts = check.check_texts(self.run.tokenizer, (self.card.query_max_length, self.card.doc_max_length))
        self.vectors = check.vectors_here(self.run, self.texts)

    def _find_direction(self) -> dict[str, bool]:
        """What direction_in_config gives for this model; UserError if nothing, or for an adapter."""
        direction = direction_in_config(self.config, self.trust_remote_code)
        if self.output_format == "adapter" or direction is None:
            raise UserError(
                f"--format {self.output_format}: this run attends in both directions (--bidirectional true), and the "
                "libraries that would load the export know its model as causal; "
                + ("choose merged or sentence-transformers, or " if self.output_format == "adapter" else "")
                + "use ds_embed.Embedder or ds-embed generate"
            )
        return direction

    def fill(self, folder: Path, name: str) -> None:
        save_tokenizer(self.tokenizer, folder)
        notes = self._check_tokens(folder)
        model_options = without_pooler(self.config)
        if self.output_format == "adapter":
            save_adapter(self.run.encoder, self.run.encoder.backbone.state_dict(), folder)
        else:
            self._write_weights(folder)
        hidden_size = self.config.get_text_config().hidden_size
        write_modules(folder, self.card, hidden_size, self.run.encoder.head.state_dict(), model_options)
        lengths = self.card.query_max_length, self.card.doc_max_length
        if self.output_format == "sentence-transformers" and lengths[0] != lengths[1]:
            cuts = "encode_query cuts at {} tokens and encode_document at {}".format(*lengths)
            notes.append(f"{cuts}; encode with prompt_name cuts both at the larger")
        page = readme(self.card, name, self.output_format, bool(model_options), notes)
        (folder / "README.md").write_text(page, "utf-8")
        self.run = None  # one model at a time in memory
        self._check_vectors(folder)
        for note in notes:
            print(f"note: {note}")

    def _embedder(self, source: ModelSource) -> Embedder:
        model = ModelArguments(source.base, trust_remote_code=self.trust_remote_code)
        text = TextArguments()
        return Embedder.from_source(source, model, text, device=self.device, bf16=False, keep_weights=True)

    def _check_tokens(self, folder: Path) -> list[str]:
        """Compare token ids; returns what a user must know about texts that spell control tokens."""
        from transformers import AutoTokenizer

        exported = AutoTokenizer.from_pretrained(folder)
        odd = check.odd_tokens(self.run.tokenizer, exported, self.card, self.texts)
        if odd:
            raise UserError(
                f"--run {self.source.tokenizer}: this tokenizer can't be made to do by itself what ds_embed does with "
                f"it: {odd[0]!r} gets other tokens; nothing was written"
            )
        print(f"checked tokens: {len(self.texts)} texts as query and as document have the ids of the run")
        odd = check.odd_tokens(self.run.tokenizer, exported, self.card, check.spelled_texts(self.run.tokenizer))
        if not odd:
            return []
        return [f"texts that spell a control or added token, as in {odd[0]!r}, have other tokens than in ds_embed"]

    def _write_weights(self, folder: Path) -> None:
        backbone = self.run.encoder.backbone
        if self.needs_merging:
            backbone = self.run.encoder.backbone = backbone.merge_and_unload(safe_merge=True)
            agreement = check.Agreement.of(self.vectors, check.vectors_here(self.run, self.texts))
            agreement.require(check.MIN_COSINE, "the adapter merged into the base in float32")
            print(f"checked merging in float32: {agreement}")
        backbone.config.update(self.direction)
        backbone.to(self.dtype).save_pretrained(folder)

    def _check_vectors(self, folder: Path) -> None:
        expected = self.vectors
        if self.output_format != "adapter" and not self.is_exact:
            # The libraries must agree on the weights as they are stored; how far these are from the run is told apart.
            expected = check.vectors_here(self._embedder(find_model(str(folder))), self.texts)
            agreement = check.Agreement.of(self.vectors, expected)
            name = str(self.dtype).removeprefix("torch.")
            what = f"the model with weights in {name} (--dtype float32 keeps them exact)"
            agreement.require(check.MIN_COSINE_ROUNDED, what)
            print(f"checked weights rounded to {name}: {agreement}")
        rest = (self.device, self.trust_remote_code)
        name, base = ("PeftModel", self.source.base) if self.output_format == "adapter" else ("AutoModel", None)
        libraries = {}
        if is_plain(self.card):
            libraries[name] = partial(check.vectors_of_transformers, folder, base, self.card, self.texts, *rest)
        if self.output_format == "sentence-transformers" or not libraries:
            libraries["SentenceTransformer"] = partial(
                check.vectors_of_sentence_transformers, folder, self.texts, *rest
            )
        for library, vectors in libraries.items():
            agreement = check.Agreement.of(expected, vectors(torch.float32)).require(check.MIN_COSINE, library)
            print(f"checked {library} in float32: {agreement}")
            low = check.Agreement.of(self.vectors, vectors(torch.bfloat16))
            print(f"        {library} in bfloat16, for comparison: {low}")
