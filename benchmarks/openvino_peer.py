"""sentence-transformers on OpenVINO in int8: a contestant of encode.py, in an environment of its own.

    python -m venv openvino && openvino/bin/pip install 'sentence-transformers[openvino]' torch==2.13.0
    python benchmarks/encode.py ... --openvino_python openvino/bin/python

OpenVINO's packages want an older transformers than ours, so this file imports nothing of ds_embed.
"""

import json
import time


def encode(*, model: str, text_file: str, max_length: int, calibration_texts: int = 300) -> dict:
    """`SentenceTransformer.encode` of the texts of a file; weights and activations are quantized to 8 bits by NNCF.

    The first texts calibrate the activations, which counts as no time of encoding. cosine: the mean of the vectors'
    cosines with those of the same model in float32, over these texts.
    """
    import nncf
    import numpy as np
    from sentence_transformers import SentenceTransformer

    with open(text_file, encoding="utf-8") as lines:
        texts = [json.loads(line)["pos_doc"] for line in lines]
    transformer = SentenceTransformer(model, backend="openvino", device="cpu")
    transformer.max_seq_length = max_length
    plain = transformer.encode(texts[:calibration_texts], normalize_embeddings=True)
    backbone = transformer[0].auto_model
    names = [one.get_any_name() for one in backbone.model.inputs]
    samples = [transformer.tokenizer(t, truncation=True, max_length=max_length) for t in texts[:calibration_texts]]
    inputs = [{name: np.array([sample[name]]) for name in names} for sample in samples]
    backbone.model = nncf.quantize(backbone.model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER)
    backbone.clear_requests()
    backbone.compile()
    quantized = transformer.encode(texts[:calibration_texts], normalize_embeddings=True)
    started = time.perf_counter()
    transformer.encode(texts)
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, transformer.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]))
    cosine = float((plain * quantized).sum(1).mean())
    return {"tokens_per_second": num_tokens / seconds, "seconds": seconds, "num_tokens": num_tokens, "cosine": cosine}
