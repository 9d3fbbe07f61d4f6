"""The page of an exported folder: what the model is, and how each library loads it."""

from pathlib import Path

import jinja2

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
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["repr"] = repr
    template = environment.from_string((Path(__file__).parent / "readme.md").read_text(encoding="utf-8"))
    options = ", add_pooling_layer=False" if without_pooler else ""
    known = {"card": card, "name": name, "output_format": output_format, "notes": notes, "options": options}
    is_path = Path(card.base_model).is_absolute()
    return template.render(known, is_path=is_path, is_plain=is_plain(card), pooling=_POOLING.get(card.pooling))


def is_plain(card: EmbeddingCard) -> bool:
    """Whether a few lines beside the transformers model make its vectors: one pooling of all tokens, then length 1."""
    return card.pooling in _POOLING and card.include_prompt and card.head == [NORMALIZE]
