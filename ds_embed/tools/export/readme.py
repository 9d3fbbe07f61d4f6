"""The page of an exported folder: what the model is, and how each library loads it."""

from pathlib import Path

from ds_embed.models.card import EmbeddingCard
from ds_embed.models.pooling import NORMALIZE

# Lines of Python from `states` (B, S, D) and `mask` (B, S) to `vectors` (B, D).
_POOLING = {
    "mean": "vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "vectors = states[:, 0]",
    "last": "vectors = states[torch.arange(len(states)), mask.sum(1) - 1]",
    "weighted_mean": """weights = mask * torch.arange(1, mask.shape[1] + 1)
    vectors = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)""",
}


def readme(card: EmbeddingCard, name: str, output_format: str, without_pooler: bool, notes: list[str]) -> str:
    """Markdown with a front matter as model hubs read it. `name` is what the folder is called in the examples."""
    needs_modules = not is_plain(card)  # which only sentence-transformers and ds_embed read
    uses_sentence_transformers = output_format == "sentence-transformers" or needs_modules
    library = {"adapter": "peft", "merged": "transformers"}.get(output_format, output_format)
    lines = ["---", f"library_name: {library}", "pipeline_tag: sentence-similarity"]
    if not Path(card.base_model).is_absolute():
        lines.append(f"base_model: {card.base_model}")
    lines += ["tags: [sentence-similarity, feature-extraction]", "---", "", f"# {name}", ""]
    kind = "A LoRA adapter for text embeddings" if output_format == "adapter" else "A text-embedding model"
    lines += [
        f"{kind}, trained with ds_embed from {card.base_model} on {card.consumed_samples:,} samples.",
        "",
        f"- pooling: {card.pooling} over the tokens, prefix {'included' if card.include_prompt else 'left out'}, then "
        f"{' and '.join(layer['type'] for layer in card.head) or 'nothing'}; compare by {card.similarity}",
        f"- queries: prefix {card.query_prefix!r}, at most {card.query_max_length} tokens",
        f"- documents: prefix {card.doc_prefix!r}, at most {card.doc_max_length} tokens",
        "- longer texts lose their end; the tokenizer adds the special tokens"
        + (", end of sequence too," if card.append_eos else "")
        + " after that",
        *(f"- {note}" for note in notes),
    ]
    if uses_sentence_transformers:
        lines += ["", "With sentence-transformers:", "", *_fenced(_sentence_transformers_code(name))]
    if not needs_modules:
        code = _transformers_code(card, name, output_format, without_pooler)
        lines += ["", "With transformers alone:", "", *_fenced(code)]
    lines += ["", "With ds_embed:", "", *_fenced(_ds_embed_code(name))]
    return "\n".join(lines) + "\n"


def is_plain(card: EmbeddingCard) -> bool:
    """Whether a few lines beside the transformers model make its vectors: one pooling of all tokens, then length 1."""
    return card.pooling in _POOLING and card.include_prompt and card.head == [NORMALIZE]


def _fenced(code: str) -> list[str]:
    return ["```python", *code.splitlines(), "```"]


def _sentence_transformers_code(name: str) -> str:
    return f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name!r})
queries = model.encode_query(["a question"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))"""


def _transformers_code(card: EmbeddingCard, name: str, output_format: str, without_pooler: bool) -> str:
    options = ", add_pooling_layer=False" if without_pooler else ""
    imports = "from transformers import AutoModel, AutoTokenizer"
    load = f"model = AutoModel.from_pretrained({name!r}{options}).eval()"
    if output_format == "adapter":
        imports = f"from peft import PeftModel\n{imports}"
        load = (
            f"base = AutoModel.from_pretrained({card.base_model!r}{options})\n"
            f"model = PeftModel.from_pretrained(base, {name!r}).eval()"
        )
    return f"""import torch
{imports}

tokenizer = AutoTokenizer.from_pretrained({name!r})
{load}


@torch.inference_mode()
def encode(texts, prefix, max_length):
    batch = tokenizer(
        [prefix + text for text in texts], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"]
    {_POOLING[card.pooling]}
    return torch.nn.functional.normalize(vectors.float(), dim=1)


queries = encode(["a question"], {card.query_prefix!r}, {card.query_max_length})
documents = encode(["a text", "another text"], {card.doc_prefix!r}, {card.doc_max_length})
print(queries @ documents.T)"""


def _ds_embed_code(name: str) -> str:
    return f"""from ds_embed import Embedder

embedder = Embedder.from_pretrained({name!r})
queries = embedder.encode_queries(["a question"])
documents = embedder.encode_documents(["a text", "another text"])
print(queries @ documents.T)"""
