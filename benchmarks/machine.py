"""Reference values for the benchmarks: the machine's rate of matrix products, and the size of a model."""

import time
from pathlib import Path


def matrix_rates(size: int = 2048, repeats: int = 12) -> dict:
    """Floating-point operations per second of a size x size x size matrix product: the best of `repeats`.

    On a CPU without bfloat16 instructions, the rate of bfloat16 is that of float32, in which its products are computed.
    """
    import torch

    from ds_embed.models.cpu import multiplies_bfloat16

    rates = {}
    for dtype in (torch.float32, torch.bfloat16) if multiplies_bfloat16() else (torch.float32,):
        left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - started)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / best
    return {"bfloat16": rates["float32"]} | rates


def count_weights(model: str) -> dict:
    """Number of weights of a model: all, and those that each token is multiplied with (N, without embedding tables)."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(model))
    tables = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, torch.nn.Embedding))
    pooler = sum(p.numel() for name, p in backbone.named_parameters() if name.startswith("pooler."))
    total = sum(p.numel() for p in backbone.parameters()) - pooler
    return {"total": total, "multiplied": total - tables, "dimensions": backbone.config.hidden_size}


def keep_layers(model: str, num_layers: int, folder: str) -> dict:
    """Save the model with only its first layers, and its tokenizer, in `folder`."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(model, num_hidden_layers=num_layers)
    AutoModel.from_pretrained(model, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    for name in ("modules.json", "1_Pooling"):  # sentence-transformers builds its pooling from our settings
        assert not (Path(folder) / name).exists()
    return {}
