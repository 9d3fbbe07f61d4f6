"""Texts in one row without padding: the same vectors, loss and gradient as padded ones, and what is refused."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tiny import MODELS, check, launch, make_model, make_training_file, sentence

from ds_embed import Embedder
from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.models import varlen
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.loading import build_encoder, find_model, load_tokenizer
from ds_embed.models.lora import add_lora
from ds_embed.models.pooling import pool, pool_packed
from ds_embed.models.varlen import Packing, Segments, by_operator, by_text, kernel_error, why_not_varlen
from ds_embed.settings import LoraArguments, StepArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.reranker_arguments import RerankerModelArguments
from ds_embed.training.step import ContrastiveStep

POOLINGS = "mean+last+cls+max+weighted_mean+mean_sqrt_len"
BIDIRECTIONAL = ["bert", "distilbert", "roberta", "xlm-roberta", "modernbert"]
BIDIRECTIONAL += ["llama-encoding", "mistral-encoding", "gemma3-encoding"]
EITHER = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"]
KINDS = [(kind, True) for kind in BIDIRECTIONAL] + [(kind, way) for kind in EITHER for way in (False, True)]
LENGTHS = (13, 9, 9, 6, 3, 1)


class Engine:
    """An encoder called as DeepSpeed's engine is."""

    def __init__(self, encoder):
        self.module = encoder.train()

    def zero_optimization_stage(self):
        return 0

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, total, scale_wrt_gas):
        total.backward()


def config_of(kind, **changes):
    config_class, sizes = MODELS[kind]
    return getattr(transformers, config_class)(**(dict(initializer_range=0.3) | sizes | changes))


def build(kind, bidirectional, kernel, pooling="mean", **changes):
    torch.manual_seed(0)
    return build_encoder(
        config_of(kind, **changes),
        pooling=pooling,
        bidirectional=bidirectional,
        bf16=False,
        attn_implementation=kernel,
        trust_remote_code=False,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("varlen")
    tokenizer = load_tokenizer(find_model(str(make_model(root / "bert", "bert"))), False)
    path = make_training_file(root / "train.jsonl", 30, num_documents=12)
    texts = TextFormat("", 24, False)
    return TrainingStore.open(build_training_store([path], tokenizer, texts, texts, 2, root / "cache"))


def step_of(encoder, store, lora, grad_cache=True):
    """Loss, gradient by name, and the plan of one step."""
    if lora:
        add_lora(encoder, LoraArguments().with_defaults(4), seed=0, dtype=torch.float32)
        noise = torch.Generator().manual_seed(5)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=noise) * 0.1
    arguments = StepArguments(global_batch_size=8, micro_batch_tokens=60, grad_cache=grad_cache, temperature=0.1)
    step = ContrastiveStep(Engine(encoder.double()), store, World.alone(), arguments, 1)
    batch = assemble_batch(store, SampleOrder(1, store.file_sizes), first_sample=0, num_queries=8, hard_negatives=2)
    inputs = step.prepare(batch)
    assert len(inputs.micro_batches) > 2 and max(m.num_texts for m in inputs.micro_batches) > 2
    result = step.run(inputs)
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad and p.grad is not None}
    return result, torch.cat([gradients[name].flatten() for name in sorted(gradients)]), inputs.plan


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind, bidirectional", KINDS)
def test_loss_and_gradient_equal_those_of_padded_texts(store, kind, bidirectional, lora):
    padded, expected, plan = step_of(build(kind, bidirectional, "sdpa"), store, lora)
    packed, got, row = step_of(build(kind, bidirectional, "varlen"), store, lora)
    assert packed.loss == pytest.approx(padded.loss, rel=1e-5)
    assert (got - expected).norm() <= 1e-5 * expected.norm() and expected.norm() > 0
    assert (packed.padding_share, row.num_padded_tokens) == (0.0, row.num_tokens)
    assert row.num_micro_batches <= plan.num_micro_batches and padded.padding_share > 0


def rows_of(kind):
    noise = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 100, (length,), generator=noise) for length in LENGTHS]
    rows[0][3] = 1  # RoBERTa's padding, which takes no position
    return rows


def alone_and_packed(kind, bidirectional, prompts=None):
    """Vectors of each text alone, without this kernel, and of all in a row."""
    plain, packed = (build(kind, bidirectional, kernel, POOLINGS).double().eval() for kernel in ("eager", "varlen"))
    rows = rows_of(kind)
    lengths, prompts = torch.tensor(LENGTHS), None if prompts is None else torch.tensor(prompts)
    alone = [
        plain(row[None], torch.tensor([len(row)]), False, None if prompts is None else prompts[i : i + 1])
        for i, row in enumerate(rows)
    ]
    return torch.cat(alone), packed(torch.cat(rows), lengths, False, prompts, max(LENGTHS))


def difference(pair):
    one, other = pair
    return float((one - other).norm() / one.norm())


@torch.no_grad()
@pytest.mark.parametrize("prompts", [None, (2, 0, 3, 8, 1, 4)])
@pytest.mark.parametrize("kind, bidirectional", KINDS)
def test_vectors_equal_those_of_each_text_alone(kind, bidirectional, prompts):
    assert difference(alone_and_packed(kind, bidirectional, prompts)) < 1e-6


@torch.no_grad()
def test_the_comparison_notices_what_could_go_wrong(monkeypatch):
    """One row seen as one text; positions that go on from text to text; windows as the model's code says them."""
    one_text = lambda lengths, *more: Segments(lengths.sum()[None], int(lengths.sum()), lengths, *more[1:])  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Segments, "of", one_text)
        assert min(difference(alone_and_packed(*kind)) for kind in (("bert", True), ("llama", False))) > 0.01
    with monkeypatch.context() as patch:
        patch.setattr(Packing, "positions", lambda self, ids, lengths: torch.arange(len(ids)))
        assert min(difference(alone_and_packed(kind, True)) for kind in ("bert", "roberta")) > 0.01
    with monkeypatch.context() as patch:
        counts = Packing.positions
        patch.setattr(Packing, "positions", lambda self, ids, n: counts(replace(self, padding_id=1), ids * 0 + 5, n))
        assert difference(alone_and_packed("roberta", True)) > 0.01
    with monkeypatch.context() as patch:
        patch.setattr(Packing, "of", lambda config, is_causal: Packing(is_causal, 0, True, None))
        assert difference(alone_and_packed("mistral-encoding", True)) > 0.01


def test_every_family_is_tried():
    tried = {config_of(kind).model_type for kind, _ in KINDS} | {"camembert"}  # whose code is RoBERTa's
    assert tried == set(varlen.FAMILIES)


@pytest.mark.parametrize("prompts", [None, (2, 0, 3, 8, 1, 4)])
def test_pooling_of_a_row_equals_that_of_padded_texts(prompts):
    noise, lengths = torch.Generator().manual_seed(0), torch.tensor(LENGTHS)
    padded = torch.randn(len(LENGTHS), max(LENGTHS), 5, generator=noise).requires_grad_()
    prompts = None if prompts is None else torch.tensor(prompts)
    weights = torch.randn(len(LENGTHS), 30, generator=noise)
    row = torch.cat([states[:length] for states, length in zip(padded, LENGTHS)])
    expected, got = pool(padded, lengths, POOLINGS, prompts), pool_packed(row, lengths, POOLINGS, prompts)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad((vectors * weights).sum(), padded)[0] for vectors in (expected, got)]
    torch.testing.assert_close(*gradients)


def test_the_embedder_gives_the_same_vectors(tmp_path):
    folder, rng = make_model(tmp_path / "model", "modernbert"), random.Random(0)
    texts = [sentence(rng, 1, 40) for _ in range(60)]
    options = dict(dtype="float32", micro_batch_tokens=128, query_prefix="query: ")
    one, other = (
        Embedder.from_pretrained(folder, attn_implementation=name, **options).encode_queries(texts)
        for name in (None, "varlen")
    )
    np.testing.assert_allclose(other, one, atol=2e-6)


def test_micro_batches_are_full_of_tokens(monkeypatch, tmp_path):
    embedder = Embedder.from_pretrained(
        make_model(tmp_path / "model", "bert"), attn_implementation="varlen", micro_batch_tokens=100
    )
    seen = []
    forward = TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, *parts: (seen.append(parts), forward(self, *parts))[1])
    rng = random.Random(0)
    embedder.encode_queries([sentence(rng, 1, 40) for _ in range(200)])
    sizes = [len(ids) for ids, *_ in seen]
    assert max(sizes) <= 100
    # The next text would not have fitted in.
    assert all(size + int(following[1][0]) > 100 for size, following in zip(sizes, seen[1:]))
    assert all(len(parts) == 5 and parts[4] == int(parts[1].max()) for parts in seen)


# What decides by itself.

GPU = replace(World.alone(), device=torch.device("cuda"))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that need not be here: its capability, and what trying the operator on it shows."""
    facts = {"capability": (9, 0), "shows": None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: facts["capability"])
    monkeypatch.setattr(varlen, "_why_not_here", lambda *_: facts["shows"])
    return facts


def reason(config, asked=None, world=GPU, bf16=True, is_trained=True):
    return why_not_varlen(config, asked, world, bf16=bf16, is_trained=is_trained)


def test_taken_by_itself_where_model_and_gpu_allow(gpu):
    for kind in ("bert", "distilbert", "modernbert", "mistral"):
        assert reason(config_of(kind)) is None
    with_dropout = config_of("bert", attention_probs_dropout_prob=0.1)
    assert reason(with_dropout, is_trained=False) is None
    for expected, config, more in (
        ("attention_probs_dropout_prob 0.1", with_dropout, {}),
        ("attention_dropout 0.2", config_of("modernbert", attention_dropout=0.2), {}),
        ("bfloat16", config_of("bert"), dict(bf16=False)),
        ("not for this t5", config_of("T5"), {}),
        ("not for this gemma2", config_of("gemma2"), {}),
        ("multiple of 8 dimensions up to 256, and the model's have 12", config_of("llama", head_dim=12), {}),
        ("sdpa was asked for", config_of("bert"), dict(asked="sdpa")),
        ("no GPU", config_of("bert"), dict(world=World.alone())),
    ):
        assert expected in reason(config, **more)
        if more.get("asked") is None and more.get("world") is None:
            with pytest.raises(UserError, match="--attn_implementation varlen: .*; leave it out"):
                reason(config, asked="varlen", **more)
    gpu["capability"] = (7, 5)
    assert "capability 8.0 (Ampere) and later, and this one has 7.5" in reason(config_of("bert"))
    gpu |= {"capability": (8, 0), "shows": "computes something else"}
    assert reason(config_of("bert")) == "computes something else"


def test_all_ranks_take_it_or_none(gpu, monkeypatch):
    monkeypatch.setattr(World, "max", lambda self, values: [1.0])  # another rank has a reason
    assert reason(config_of("bert")) == "can't be used on another rank's GPU"


def test_what_the_trial_on_a_gpu_finds(monkeypatch):
    def wrong_window(query, key, value, segments, window, scaling):
        return by_text(query, key, value, segments, (window or 400) - 1, scaling)

    def leaking(query, key, value, segments, window, scaling):
        lengths = torch.cat([segments.lengths[:2].sum()[None], segments.lengths[2:]])
        return by_text(query, key, value, replace(segments, lengths=lengths), window, scaling)

    def other_direction(query, key, value, segments, window, scaling):
        return by_text(query, key, value, replace(segments, is_causal=not segments.is_causal), window, scaling)

    def error(compute):
        here = torch.device("cpu")
        cases = [(is_causal, window) for is_causal in (False, True) for window in (None, 7)]
        return [kernel_error(here, 4, 2, 16, is_causal, window, compute) for is_causal, window in cases]

    assert max(error(by_text)) < varlen._LARGEST_ERROR / 2
    assert max(error(wrong_window)) > 4 * varlen._LARGEST_ERROR
    for wrong in (leaking, other_direction):
        assert min(error(wrong)) > 4 * varlen._LARGEST_ERROR
    # Without a GPU the operator itself raises, which counts as not running here.
    assert "does not run on this GPU" in varlen._why_not_here(config_of("bert"), torch.device("cpu"))
    monkeypatch.setattr(varlen, "kernel_error", lambda *_: float("nan"))
    assert "computes something else" in varlen._why_not_here(config_of("bert"), torch.device("cpu"))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_the_operator_is_told_what_each_token_sees(monkeypatch, is_causal, window):
    """What torch's documentation says the arguments mean, written out in float64."""
    lengths, noise = torch.tensor([7, 12, 1]), torch.Generator().manual_seed(0)
    parts = [torch.randn(20, heads, 8, generator=noise, dtype=torch.float64) for heads in (4, 2, 2)]

    def plain(query, key, value, bounds, same_bounds, longest, same_longest, *, scale, window_size, enable_gqa):
        assert enable_gqa and longest == same_longest == 12 and bounds is same_bounds and bounds.dtype == torch.int32
        left, right = (20 if side == -1 else side for side in window_size)
        out = torch.zeros_like(query)
        for first, last in zip(bounds.tolist(), bounds.tolist()[1:]):
            for token in range(first, last):
                seen = slice(max(first, token - left), min(last, token + right + 1))
                for head in range(4):
                    scores = (key[seen, head // 2] @ query[token, head]) * scale
                    out[token, head] = torch.softmax(scores, 0) @ value[seen, head // 2]
        return out

    import torch.nn.attention.varlen as of_torch

    monkeypatch.setattr(of_torch, "varlen_attn", plain)
    segments = Segments.of(lengths, 12, is_causal)
    torch.testing.assert_close(
        by_operator(*parts, segments, window, 0.3), by_text(*parts, segments, window, 0.3), rtol=1e-9, atol=1e-9
    )


def test_what_can_not_be_packed_is_refused_by_name():
    for kind in ("mpnet", "T5", "embedding_gemma2"):
        with pytest.raises(UserError, match="--attn_implementation varlen: not for this .*; it is for bert, "):
            build(kind, True, "varlen")
    with pytest.raises(UserError, match="--attn_implementation varlen: not for rerankers"):
        RerankerModelArguments(model_name_or_path="x", attn_implementation="varlen")
    encoder = build("bert", True, "varlen", attention_probs_dropout_prob=0.1).train()
    with pytest.raises(UserError, match="does not know dropout"):
        encoder(torch.tensor([5, 6, 7]), torch.tensor([2, 1]), False, None, 2)


def test_trains_validates_and_encodes_on_two_ranks(tmp_path):
    """As users run it, on CPUs: nothing is padded, and the vectors are those of the padded model."""
    make_model(tmp_path / "bert", "bert")
    train = make_training_file(tmp_path / "train.jsonl", 40, num_negatives=1)
    common = ["--cache_dir", tmp_path / "cache", "--bf16", "false", "--micro_batch_tokens", 150]
    common += ["--attn_implementation", "varlen"]
    flags = ["--model_name_or_path", tmp_path / "bert", "--train_files", train, "--output_dir", tmp_path / "run"]
    flags += ["--deepspeed", "ds_configs/zero3.json", "--max_length", 32, "--global_batch_size", 12]
    flags += ["--max_steps", 4, "--learning_rate", "2e-3", "--report_to", "none", "--grad_cache", "true"]
    flags += ["--val_files", train, "--val_query_files", train, "--val_doc_files", train, "--hard_negatives", 1]
    told = check(launch(2, "recipes/train_bert.py", *flags, *common))
    assert "attention      varlen: texts stand one behind the other" in told.stdout + told.stderr
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["padding_share"] for line in lines if "loss" in line] == [0.0] * 4
    assert any("val_loss" in line for line in lines)
    flags = ["--model_name_or_path", tmp_path / "run", "--doc_files", train, "--output_prefix", tmp_path / "out"]
    check(launch(2, "recipes/generate.py", *flags, *common))
    (folder,) = (tmp_path / "out").glob("*/test_docs")
    assert any("varlen" in path.read_text() for path in folder.glob("*.json"))
    documents = [json.loads(line)["pos_doc"] for line in open(train)]
    padded = Embedder.from_pretrained(tmp_path / "run", dtype="float32").encode_documents(documents)
    np.testing.assert_allclose(np.load(folder / "doc.npy"), padded, atol=1e-5)
