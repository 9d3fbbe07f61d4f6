"""A tokenizer that does by itself what TextTokenizer does, for libraries that know nothing of ds_embed."""

import json
from pathlib import Path
from typing import Any

from ds_embed.data.tokenize import SpecialTokens


def self_contained(tokenizer: Any, *, append_eos: bool, max_length: int) -> Any:
    """A fast tokenizer whose plain call gives the ids of TextTokenizer.

    Blanks around a text go, a text that is too long loses its end, and the special tokens, EOS too where
    wanted, come after that. Text that spells a special token stays text. Padding is on the right.
    """
    from tokenizers import Tokenizer, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    special = SpecialTokens.of(tokenizer, append_eos)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    strip = normalizers.Strip()
    backend.normalizer = strip if backend.normalizer is None else normalizers.Sequence([strip, backend.normalizer])
    head = [backend.id_to_token(token) for token in special.head]
    tail = [backend.id_to_token(token) for token in special.tail]
    backend.post_processor = processors.TemplateProcessing(
        single=[*head, "$A", *tail], special_tokens=list(zip([*head, *tail], [*special.head, *special.tail]))
    )
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    # Which one does not matter: the attention mask hides it.
    names.setdefault("pad_token", names.get("eos_token") or names.get("unk_token") or backend.id_to_token(0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=True,
        padding_side="right",
        truncation_side="right",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
