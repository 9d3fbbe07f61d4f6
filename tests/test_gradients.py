"""The gradient contract: any ranks, ZeRO stage, micro-batches and grad_cache give one process's float64 gradient."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_reference import reference, scored_reference
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import save_file
from tiny import (
    check,
    launch,
    make_model,
    make_training_file,
    write_labelled_texts,
    write_scored_pairs,
    write_teacher_scores,
)

from ds_embed.data.batch import assemble_batch, collate
from ds_embed.data.forms import Reading
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.models.loading import find_model, load_encoder, load_tokenizer
from ds_embed.models.lora import add_lora
from ds_embed.models.lora_linear import LoraLinear
from ds_embed.models.pooling import NORMALIZE
from ds_embed.settings import LoraArguments

TOLERANCE = 1e-5
FAMILIES = ("roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert")
OTHERS = ("T5",)  # of which the encoder alone is loaded
# Behind a BERT whose pooling leaves the prompt's tokens out.
DENSE = {"type": "Dense", "path": "2_Dense", "in_features": 32, "out_features": 24, "bias": True}
DENSE |= {"activation": "Tanh", "use_residual": False}
BASE = dict(
    model="llama",
    lora=0,
    alpha=32.0,
    variant="lora",
    partitioned=False,
    zero=0,
    budget=64,
    grad_cache=False,
    negatives="all",
    hard_negatives=2,
    queries=8,
    checkpointing=False,
    bf16=False,
    dropout=0.0,
    bidirectional=False,
    data="plain",
    kernel=None,
    loss={},
    models={},
)


def cases(num_ranks: int) -> dict[str, dict]:
    """Each setting in every stage at least once; the risky pairs (stage x grad_cache x LoRA) all."""
    found = {}

    def add(**changes):
        case = BASE | changes
        words = {key: "+".join(changes[key]) for key in ("loss", "models") if key in changes}
        named = changes | words | {k: v for k, v in changes.get("loss", {}).items() if k == "teacher_loss"}
        found["_".join(f"{k}-{v}" for k, v in named.items())] = case

    for zero in (0, 1, 2, 3):
        for grad_cache in (False, True):
            for lora in (0, 4):
                model = "bert" if (zero + grad_cache + lora // 4) % 2 else "llama"
                add(zero=zero, grad_cache=grad_cache, lora=lora, model=model)
    for zero, budget in ((2, 32), (3, 200), (3, 10_000), (0, 27)):
        for grad_cache in (False, True):
            add(zero=zero, budget=budget, grad_cache=grad_cache)
    add(zero=2, grad_cache=True, negatives="own", lora=4)
    add(zero=3, grad_cache=False, negatives="own", model="bert")
    add(zero=3, grad_cache=True, negatives="pair", lora=4)
    add(zero=1, grad_cache=False, negatives="pair", hard_negatives=1)
    add(zero=2, grad_cache=False, hard_negatives=0, queries=7)
    add(zero=3, grad_cache=True, checkpointing=True, lora=4)
    add(zero=2, grad_cache=False, checkpointing=True)
    add(zero=3, grad_cache=True, lora=4, bidirectional=True)
    add(zero=2, grad_cache=False, checkpointing=True, bidirectional=True)
    for variant, stages in (("dora", (0, 1, 2)), ("pissa", (0, 1, 2, 3))):
        for zero in stages:
            grad_cache = (zero % 2 == 0) == (variant == "dora")
            add(zero=zero, grad_cache=grad_cache, lora=4, variant=variant, budget=64 + 64 * (zero % 2))
    add(zero=2, grad_cache=True, lora=4, variant="rslora", alpha=16.0)
    add(zero=2, grad_cache=False, lora=4, variant="dora", checkpointing=True)
    for variant in ("lora", "pissa"):
        add(zero=3, lora=4, variant=variant, partitioned=True, grad_cache=variant == "lora", checkpointing=True)
    # Fewer texts than ranks: some ranks encode dummies only.
    add(zero=3, grad_cache=True, queries=1, hard_negatives=0, model="bert")
    add(zero=2, grad_cache=False, queries=1, hard_negatives=1)
    add(zero=2, grad_cache=True, loss=dict(label_smoothing=0.1, symmetric=True))
    add(zero=3, grad_cache=False, loss=dict(symmetric=True, false_negative_margin=-0.02), negatives="hard")
    add(zero=3, grad_cache=True, loss=dict(matryoshka_dims=[32, 8], matryoshka_weights=[1.0, 0.5]))
    add(zero=1, grad_cache=False, loss=dict(distillation_weight=0.5, distillation_temperature=2.0))
    directions = ["query_document", "document_query", "query_query", "document_document"]
    for zero in (0, 1, 2, 3):
        near = dict(directions=directions[: 4 - zero % 2], hardness_weight=5.0)
        near |= dict(distillation_weight=0.01, distillation_loss="margin_mse")
        add(zero=zero, grad_cache=zero % 2 == 0, negatives=("all", "own")[zero // 2], loss=near)
    add(zero=2, grad_cache=True, data="mixed", loss=dict(directions=directions, hardness_weight=5.0))
    add(zero=3, grad_cache=False, negatives="pair", loss=dict(hardness_weight=5.0, learnable_temperature=True))
    for zero, grad_cache in ((0, True), (2, False), (2, True), (3, False), (3, True)):
        add(zero=zero, grad_cache=grad_cache, lora=4 * (zero == 2), loss=dict(learnable_temperature=True))
    # A guide, and a teacher of other dimensions, whose projection is trained.
    for number, (teacher_loss, size) in enumerate((("cosine", 20), ("mse", 40), ("scores", 20))):
        for zero in (0, 1, 2, 3):
            loss = dict(guide_margin=0.1, teacher_loss=teacher_loss, teacher_weight=0.5, symmetric=zero == 2)
            cached = (zero + number) % 2 == 0
            add(zero=zero, grad_cache=cached, lora=4 * (zero == 3), loss=loss, models=dict(guide=12, teacher=size))
    add(zero=3, grad_cache=True, loss=dict(teacher_loss="mse"), models=dict(teacher=32), data="mixed")
    loss = dict(teacher_loss="cosine", pair_loss="cosent", pair_temperature=0.1)
    add(zero=2, grad_cache=True, queries=16, loss=loss, models=dict(guide=12, teacher=20), data="both")
    add(zero=2, grad_cache=False, negatives="own", loss=dict(guide_margin=0.0), models=dict(guide=12), data="mixed")
    # Records with and without hard negatives, siblings of one query, a sibling among the hard negatives.
    add(zero=2, grad_cache=True, data="mixed", loss=dict(symmetric=True))
    add(zero=3, grad_cache=False, data="mixed", negatives="own")
    # Labelled texts, alone and beside queries and documents, whose hard negatives are drawn.
    for zero, data in enumerate(("labels", "labels_and_records") * 2):
        loss, hards = dict(symmetric=True), 2
        if zero > 1:
            loss, hards = dict(negatives_per_file=["pair", "all"][: zero - 1]), [2, 1][: zero - 1]
        add(zero=zero, grad_cache=zero < 2, data=data, queries=16, hard_negatives=hards, loss=loss)
    # Files with settings of their own, the two of scored pairs among them.
    for zero, data in enumerate(("files", "files", "all_files", "all_files")):
        own = dict(negatives_per_file=["all", "pair", "own", "own"], temperature_per_file=[0.1, 0.2, 0.07, 1.0])
        own = {name: values[: 4 if data == "all_files" else 2] for name, values in own.items()}
        more = dict(pair_loss="cosent", pair_temperature=0.1) if data == "all_files" else dict(symmetric=True)
        hards = [1, 2, 0, 0][: len(own["negatives_per_file"])]
        add(zero=zero, grad_cache=zero % 2 == 1, data=data, queries=16, hard_negatives=hards, loss=own | more)
    # Scored pairs alone, and two files of them beside queries and documents.
    for zero, (loss, data) in enumerate(
        [("cosent", "both"), ("angle", "both"), ("cosine", "both"), ("cosent", "scored")]
    ):
        for grad_cache in (False, True):
            dims = dict(matryoshka_dims=[32, 9], matryoshka_weights=[1.0, 0.5]) if grad_cache else {}
            add(
                zero=zero,
                grad_cache=grad_cache,
                data=data,
                queries=16,
                loss=dict(pair_loss=loss) | (dict(pair_temperature=0.1) if loss in ("cosent", "angle") else {}) | dims,
            )
    for zero, grad_cache in ((2, False), (2, True), (3, False), (3, True)):
        add(zero=zero, grad_cache=grad_cache, model="dense", lora=4 * (zero == 3 and grad_cache))
    for number, model in enumerate(FAMILIES + OTHERS):
        add(zero=2 + number % 2, grad_cache=number % 2 == 0, negatives="own", model=model)
    # Texts in one row, in which some micro-batches hold one text and some many.
    for number, model in enumerate(("llama", "bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "dense")):
        for zero, lora in ((number % 4, 0), ((number + 2) % 4, 4)):
            add(kernel="varlen", model=model, zero=zero, lora=lora, grad_cache=number % 2 == 0, budget=40 + 20 * zero)
    add(kernel="varlen", zero=3, grad_cache=True, checkpointing=True, lora=4, bidirectional=True)
    add(kernel="varlen", zero=3, grad_cache=True, queries=1, hard_negatives=0, model="bert")
    return found


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """Model folders and token stores by kind of model."""
    root = tmp_path_factory.mktemp("gradients")
    # Few documents, so that most of a batch's texts stand in several places.
    path = make_training_file(root / "train.jsonl", 40, num_negatives=2, num_documents=9)
    data = write_teacher_scores(path)
    found = {"root": root}
    for kind in ("llama", "bert", *FAMILIES, *OTHERS, "dense"):
        folder = make_model(root / kind, "bert" if kind == "dense" else kind)
        tokenizer = load_tokenizer(find_model(str(folder)), False)
        prefixes = ("query: ", "passage: w1 " if kind == "dense" else "passage: ")
        formats = [TextFormat(prefix, 24, kind == "llama", kind != "dense") for prefix in prefixes]
        if kind == "dense":
            torch.manual_seed(7)
            (folder / "2_Dense").mkdir()
            weights = {"linear.weight": torch.randn(24, 32) * 0.3, "linear.bias": torch.randn(24) * 0.3}
            save_file(weights, folder / "2_Dense" / "model.safetensors")
        found[kind] = str(folder), str(build_training_store([data], tokenizer, *formats, 2, root / "cache"))
        if kind == "llama":
            for num_dims in (12, 20, 32, 40):
                write_vectors(root / f"vectors{num_dims}", TrainingStore.open(found[kind][1]), num_dims)
            mixed = build_training_store([_mixed(data)], tokenizer, *formats, 2, root / "cache")
            found["mixed"] = str(folder), str(mixed)
            pairs = [write_scored_pairs(root / f"scored{n}.jsonl", 20 + n, seed=n) for n in range(2)]
            other = write_teacher_scores(make_training_file(root / "other.jsonl", 40, 2, seed=8, num_documents=9))
            labels = write_labelled_texts(root / "labels.jsonl", 40)
            named = {"labels": [labels], "labels_and_records": [labels, data]}
            named |= {"scored": pairs[:1], "both": [data, *pairs], "files": [data, other]}
            for name, files in (named | {"all_files": [data, other, *pairs]}).items():
                store = build_training_store(
                    files, tokenizer, *formats, 2, root / "cache", reading=Reading(kinds=("scored", "labels"))
                )
                found[name] = str(folder), str(store)
    return found


def write_vectors(folder: Path, store: TrainingStore, num_dims: int) -> None:
    """Random vectors of all texts of a store, other ones for a text as a query and as a document."""
    ids = [f"{key % 2**64:016x}" for key in dict.fromkeys(store.content_keys.tolist())]
    rng = np.random.default_rng(num_dims)
    for subfolder, kind in (("test_queries", "query"), ("test_docs", "doc")):
        (folder / subfolder).mkdir(parents=True)
        rows = rng.standard_normal((len(ids), num_dims), np.float32)
        np.save(folder / subfolder / f"{kind}.npy", rows * 3)
        (folder / subfolder / f"{kind}.ids").write_text("".join(f"{name}\n" for name in ids))


def vectors_of(folder: Path, keys: list[int], num_queries: int) -> torch.Tensor:
    """Unit vectors of texts by their keys, queries and then documents, looked up one by one."""
    found = []
    for subfolder, kind, part in (
        ("test_queries", "query", keys[:num_queries]),
        ("test_docs", "doc", keys[num_queries:]),
    ):
        names = (folder / subfolder / f"{kind}.ids").read_text().splitlines()
        rows = np.load(folder / subfolder / f"{kind}.npy")
        found += [torch.from_numpy(rows[names.index(f"{key % 2**64:016x}")]).double() for key in part]
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def _mixed(path: Path) -> Path:
    """The records without ids, every third without negatives, pairs of neighbours asking one thing."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records):
        del record["query_id"], record["doc_id"]
        record["query"] = records[number // 2 * 2]["query"]
        if number % 3 == 0:
            del record["neg_doc"], record["neg_scores"]
        elif number % 2:
            record["neg_doc"][0] = records[number - 1]["pos_doc"]
    target = path.with_name("mixed.jsonl")
    target.write_text("".join(json.dumps(record) + "\n" for record in records))
    return target


def complete(case: dict, material) -> dict:
    model, store = material[case["model"] if case["data"] == "plain" else case["data"]]
    pooling = "last" if case["model"] == "llama" else "mean"
    head = [DENSE, NORMALIZE] if case["model"] == "dense" else [NORMALIZE]
    return (
        case
        | {"model": model, "store": store, "pooling": pooling, "head": head}
        | {"models": {name: str(material["root"] / f"vectors{num_dims}") for name, num_dims in case["models"].items()}}
    )


def reference_gradients(case: dict, material) -> tuple[float, dict[str, torch.Tensor]]:
    """The whole batch in one padded forward of a float64 model, the reference loss, plain autograd."""
    kind, case = case["model"], complete(case, material)
    store = TrainingStore.open(case["store"])
    # ModernBERT's eager kernel gives NaN in float64 where a window holds nothing but padding.
    kernel = "sdpa" if kind == "modernbert" else "eager"
    encoder = load_encoder(
        find_model(case["model"]),
        pooling=case["pooling"],
        bidirectional=False,
        bf16=False,
        attn_implementation=kernel,
        trust_remote_code=False,
        head=case["head"],
    )
    if case["lora"]:
        lora = LoraArguments(lora_rank=case["lora"], lora_alpha=case["alpha"], lora_variant=case["variant"])
        add_lora(encoder, lora, seed=1, dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name and case["variant"] != "pissa":
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        for module in encoder.modules():  # PEFT's own computation, by autograd
            if isinstance(module, LoraLinear):
                module.__class__ = PeftLinear
    encoder = encoder.double()
    n = case["queries"]
    order = SampleOrder(3, store.file_sizes)
    batch = assemble_batch(store, order, first_sample=4, num_queries=n, hard_negatives=case["hard_negatives"])
    assert n < 8 or case["data"] == "scored" or len(batch.texts) < len(batch.rows), "no text stands in two places"
    # Every use is encoded, also of texts that stand in several places.
    ids, lengths = map(torch.from_numpy, collate(store, batch.texts[batch.rows]))
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
    # A four-dimensional mask is added to the scores as it is: written out, it hides padding and nothing else.
    shown = (1.0 - mask.double())[:, None, None, :] * torch.finfo(torch.float64).min if case["bidirectional"] else mask
    states = encoder.backbone(input_ids=ids, attention_mask=shown).last_hidden_state
    if kind == "dense":  # [CLS] and the prefix
        left_out = torch.from_numpy(store.prompt_lengths_of(batch.texts[batch.rows]))
        assert set(left_out.tolist()) == {2, 3}
        mask = mask * (torch.arange(ids.shape[1])[None, :] >= left_out[:, None])
    if case["pooling"] == "last":
        pooled = states[torch.arange(len(ids)), lengths - 1]
    else:
        pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    if kind == "dense":
        pooled = torch.tanh(encoder.head[0].linear(pooled))
    table = torch.nn.functional.normalize(pooled, dim=1)
    options = {
        n: value
        for n, value in case["loss"].items()
        if n not in ("learnable_temperature", "pair_loss", "pair_temperature")
    }
    keys = store.content_keys[batch.uses].tolist()
    options |= {name: vectors_of(Path(folder), keys, batch.num_queries) for name, folder in case["models"].items()}
    options |= dict(teacher_temperature=0.1)  # that of the loss, unless told otherwise
    if (
        "teacher" in options
        and options.get("teacher_loss") != "scores"
        and options["teacher"].shape[1] != table.shape[1]
    ):
        encoder.learn_projection(table.shape[1], options["teacher"].shape[1], seed=3)
        options["projected"] = table[: batch.num_document_uses] @ encoder.projection.weight.double().T
    modes, temperatures = (options.pop(f"{name}_per_file", None) for name in ("negatives", "temperature"))
    change = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    losses = []
    assert len(batch.groups) == {"files": 2, "all_files": 2, "scored": 0}.get(
        case["data"], 1 + (case["data"] == "labels_and_records" and modes is not None)
    )
    for group in batch.groups:
        contrastive = reference(
            table[: batch.num_document_uses],
            torch.from_numpy(batch.document_keys),
            batch.num_queries,
            temperatures[group.file] if temperatures else 0.1 * torch.exp(-change),
            modes[group.file] if modes else case["negatives"],
            teacher_scores=torch.from_numpy(batch.teacher_scores).double(),
            own=[[number for number in own if number >= 0] for own in batch.own_negatives.tolist()],
            pairs=batch.positive_pairs.tolist(),
            queries=range(group.start, group.stop),
            texts=batch.rows.tolist(),
            **options,
        )
        losses.append(contrastive * (group.stop - group.start) / n)
    assert len(batch.scored_groups) == {"scored": 1, "both": 2, "all_files": 2}.get(case["data"], 0)
    for file, start, stop, _ in batch.scored_groups:
        warmth = temperatures[file] if temperatures else case["loss"].get("pair_temperature")
        both = table[batch.num_document_uses :].view(2, -1, table.shape[1])[:, start:stop]
        scores = torch.from_numpy(batch.pair_scores[start:stop]).double()
        for dims, weight in zip(options.get("matryoshka_dims", [32]), options.get("matryoshka_weights", [1.0])):
            sides = torch.nn.functional.normalize(both[..., :dims], dim=2)
            sides = torch.nn.functional.pad(sides, (0, dims % 2))
            scored = scored_reference(*sides, scores, case["loss"]["pair_loss"], warmth)
            losses.append(weight * scored * (stop - start) / n)
    loss = sum(losses)
    loss.backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}
    if "learnable_temperature" in case["loss"]:
        gradients["log_scale_change"] = change.grad
    return loss.item(), gradients


def relative_error(result, expected: dict[str, torch.Tensor]) -> float:
    """Of the whole gradient as one vector."""
    got = torch.cat([torch.from_numpy(result[name]).double().flatten() for name in expected])
    want = torch.cat([gradient.flatten() for gradient in expected.values()])
    return float((got - want).norm() / want.norm())


def test_dropout_is_drawn_again_by_the_second_pass(material):
    """With dropout, grad_cache on equals off: each micro-batch draws the same noise in both passes."""
    chosen = {
        f"cache{on}_zero{z}": BASE | dict(zero=z, lora=4, dropout=0.3, grad_cache=on)
        for on in (False, True)
        for z in (2, 3)
    }
    found = run_cases(2, chosen, material)
    _, without = reference_gradients(BASE | dict(lora=4), material)
    for zero in (2, 3):
        plain = {name: torch.from_numpy(found[f"cacheFalse_zero{zero}"][name]).double() for name in without}
        assert relative_error(found[f"cacheTrue_zero{zero}"], plain) <= TOLERANCE
        assert relative_error(found[f"cacheTrue_zero{zero}"], without) > 0.1  # there was noise


def test_many_micro_batches_lose_nothing_in_bf16(material):
    """Gradients of micro-batches are summed in float32: cutting the batch fine is as exact as not cutting it."""
    chosen = {
        f"zero{zero}_budget{budget}": BASE | dict(zero=zero, budget=budget, grad_cache=True, bf16=True, queries=16)
        for zero in (1, 2, 3)
        for budget in (27, 100_000)
    }
    found = run_cases(2, chosen, material)
    _, exact = reference_gradients(BASE | dict(queries=16), material)
    errors = {name: relative_error(found[name], exact) for name in chosen}
    for zero in (1, 2, 3):
        assert errors[f"zero{zero}_budget27"] < 1.5 * errors[f"zero{zero}_budget100000"] < 0.1, errors


def run_cases(num_ranks: int, chosen: dict[str, dict], material):
    out = Path(tempfile.mkdtemp(dir=material["root"]))
    listing = out / "cases.json"
    listing.write_text(json.dumps({name: complete(case, material) for name, case in chosen.items()}))
    check(launch(num_ranks, "tests/workers/gradients.py", listing, out))
    return {name: np.load(out / f"{name}.npz") for name in chosen}


def chosen_cases(num_ranks: int) -> dict[str, dict]:
    """All for 1 and 2 ranks. For 4, which show little more, each third and those with fewer texts than ranks."""
    every = cases(num_ranks)
    if num_ranks < 4:
        return every
    return {n: c for i, (n, c) in enumerate(every.items()) if i % 3 == 0 or c["queries"] == 1}


@pytest.fixture(scope="session")
def results(material):
    """The results of a number of ranks, whose cases share one launch."""
    found: dict[int, dict] = {}

    def of(num_ranks: int) -> dict:
        if num_ranks not in found:
            found[num_ranks] = run_cases(num_ranks, chosen_cases(num_ranks), material)
        return found[num_ranks]

    return of


_references: dict[str, tuple] = {}


@pytest.mark.parametrize("num_ranks, name", [(ranks, name) for ranks in (1, 2, 4) for name in chosen_cases(ranks)])
def test_gradient_equals_float64_reference(num_ranks, name, results, material):
    found = results(num_ranks)
    case = cases(num_ranks)[name]
    decisive = (
        "model",
        "lora",
        "alpha",
        "variant",
        "negatives",
        "hard_negatives",
        "queries",
        "bidirectional",
        "data",
        "loss",
        "models",
    )
    key = json.dumps({name: case[name] for name in decisive})
    if key not in _references:
        _references[key] = reference_gradients(case, material)
    loss, gradients = _references[key]
    if case["queries"] == 1 and case["hard_negatives"] == 0:  # no negatives: nothing to learn from
        assert found[name]["loss"] == 0 and all(not found[name][n].any() for n in gradients)
        return
    assert found[name]["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(found[name], gradients) <= TOLERANCE
    if "log_scale_change" in gradients:  # a single number, which the norm of all would hide
        assert found[name]["log_scale_change"] == pytest.approx(gradients["log_scale_change"].numpy(), rel=1e-4)


def test_the_contract_notices_a_factor_of_the_number_of_ranks(material):
    chosen = {f"scale{scale}_zero{zero}": BASE | dict(zero=zero, scale=scale) for zero in (2, 3) for scale in (0.5, 2)}
    found = run_cases(2, chosen, material)
    _, gradients = reference_gradients(BASE, material)
    for name in chosen:
        assert relative_error(found[name], gradients) > 0.4
