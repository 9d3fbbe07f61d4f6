"""Every loss against its few-line reference in float64, for any tiling and any cut into blocks of queries."""

import itertools
import math

import pytest
import torch
from loss_reference import reference as reference_with
from torch.nn.functional import normalize

from ds_embed.losses import LossOptions, Sums, contrastive_loss
from ds_embed.settings.step_arguments import DIRECTIONS


def make_batch(num_queries, num_hard, dim=7, seed=0, equal_documents=True):
    """A table of unit vectors, document keys and teacher scores."""
    generator = torch.Generator().manual_seed(seed)
    num_documents = num_queries * (1 + num_hard)
    table = torch.randn(num_queries + num_documents, dim, generator=generator, dtype=torch.float64)
    keys = torch.arange(3 * num_documents).view(3, num_documents).T.clone()
    if equal_documents:
        keys[1, 0] = keys[0, 0]  # two queries share a document
        keys[-1, 1] = keys[num_queries - 1, 1]  # an own (or foreign) document equal to a positive
        keys[num_queries // 2, 2] = keys[2, 2]
    teacher = torch.randn(num_documents, generator=generator, dtype=torch.float64)
    return normalize(table, dim=1), keys, teacher


def with_models(table, options):
    """The options, with the vectors of the guide and the teacher in place of their dimensions."""
    found = {}
    for name in {"guide", "teacher"} & options.keys():
        generator = torch.Generator().manual_seed(len(name))
        weights = torch.randn(table.shape[1], options[name], generator=generator, dtype=torch.float64).to(table)
        found[name] = normalize(torch.tanh(3 * table.detach()) @ weights, dim=1)
    return options | found


def reference(table, *arguments, **options):
    return reference_with(table, *arguments, **with_models(table, options))


def own_of_all(num_queries, num_documents):
    """Each query's own negatives where all have as many, one query's after the other's."""
    return torch.arange(num_queries, num_documents).view(num_queries, -1)


def run_in_blocks(
    table, keys, num_queries, bounds, *, temperature, teacher_scores=None, own=None, pairs=None, **options
):
    """The loss as ranks compute it: each a block of queries, all added up."""
    own = own_of_all(num_queries, len(keys)) if own is None else own
    options = with_models(table, options)
    models = {name: options.pop(name, None) for name in ("guide", "teacher")}
    gradient, sums = torch.zeros_like(table), Sums.zero(table)
    for first, last in itertools.pairwise(bounds):
        part = contrastive_loss(
            table,
            keys,
            own,
            num_queries=num_queries,
            first_query=first,
            last_query=last,
            temperature=temperature,
            teacher_scores=teacher_scores,
            positive_pairs=pairs,
            **models,
            options=LossOptions(**options),
        )
        gradient += part.gradient
        sums = sums.plus(part.sums)
    return sums, gradient


NEGATIVES = [("all", 0), ("all", 3), ("own", 0), ("own", 2), ("hard", 3), ("pair", 1), ("pair", 3)]
PREFIXES = dict(matryoshka_dims=(2, 7, 4), matryoshka_weights=(0.5, 1.0, 2.0))
OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "symmetric": dict(symmetric=True),
    "margin": dict(false_negative_margin=0.05),
    "negative margin": dict(false_negative_margin=-0.3),
    "matryoshka": PREFIXES,
    "distillation": dict(distillation_weight=0.7, distillation_temperature=0.5),
    "margin distillation": dict(distillation_weight=0.7, distillation_temperature=2.0, distillation_loss="margin_mse"),
    "hardness": dict(hardness_weight=5.0),
    "hardness of near ones": dict(
        hardness_weight=3.0,
        label_smoothing=0.1,
        symmetric=True,
        false_negative_margin=0.1,
        guide=5,
        guide_margin=0.1,
        **PREFIXES,
    ),
    "queries too": dict(directions=("query_document", "query_query")),
    "documents too": dict(directions=("query_document", "document_document"), false_negative_margin=-0.1),
    "all directions": dict(directions=DIRECTIONS),
    "all directions, guided": dict(
        directions=DIRECTIONS, hardness_weight=5.0, guide=5, guide_margin=0.1, label_smoothing=0.1, **PREFIXES
    ),
    "guide": dict(guide=5, guide_margin=0.1),
    "relative guide": dict(
        guide=5, guide_margin=0.1, guide_is_relative=True, symmetric=True, false_negative_margin=0.2
    ),
    "teacher": dict(teacher=7, teacher_loss="cosine", teacher_weight=0.7),
    "squared distance": dict(teacher=7, teacher_loss="mse", **PREFIXES),
    "teacher's similarities": dict(teacher=5, teacher_loss="scores", teacher_weight=0.7, teacher_temperature=0.2),
    "all at once": dict(
        label_smoothing=0.2, symmetric=True, false_negative_margin=0.1, distillation_weight=2.0, **PREFIXES
    )
    | dict(guide=5, guide_margin=-0.1, teacher=3, teacher_loss="scores", teacher_temperature=0.5),
}


def options_of(name, num_hard, negatives="all"):
    # Without own negatives there is no ranking to learn; two at a time there is one direction.
    options = OPTIONS[name] | ({} if num_hard else dict(distillation_weight=0.0))
    return options | (dict(directions=("query_document",)) if negatives == "pair" else {})


@pytest.mark.parametrize("negatives, num_hard", NEGATIVES)
@pytest.mark.parametrize("name, equal_documents", [*((name, True) for name in OPTIONS), ("all at once", False)])
def test_equals_reference(negatives, num_hard, equal_documents, name):
    options = options_of(name, num_hard, negatives)
    table, keys, teacher = make_batch(9, num_hard, equal_documents=equal_documents)
    t = table.clone().requires_grad_()
    log_scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    expected = reference(t, keys, 9, torch.exp(-log_scale), negatives, teacher_scores=teacher, **options)
    expected.backward()
    for tiles, bounds in (((1024, 8192), [0, 9]), ((3, 4), [0, 9]), ((3, 4), [0, 4, 9]), ((5, 1), [0, 1, 1, 8, 9])):
        sums, gradient = run_in_blocks(
            table,
            keys,
            9,
            bounds,
            temperature=torch.exp(-log_scale).item(),
            negatives=negatives,
            teacher_scores=teacher,
            tile_queries=tiles[0],
            tile_documents=tiles[1],
            **options,
        )
        torch.testing.assert_close(sums.loss, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, t.grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(sums.grad_log_scale, log_scale.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("negatives", ["all", "own", "hard", "pair"])
@pytest.mark.parametrize("name", OPTIONS)
def test_queries_without_negatives_and_further_positives_equal_the_reference(negatives, name):
    """Queries 0, 3 and 8 have no hard negatives; some documents are positives of queries whose positive is another."""
    without, num_hard = (0, 3, 8), 2
    table, keys, teacher = make_batch(9, num_hard)
    lists = [[] if i in without else [9 + i * num_hard + k for k in range(num_hard)] for i in range(9)]
    kept = [*range(9), *itertools.chain(*lists)]
    place = {document: number for number, document in enumerate(kept)}
    lists = [[place[j] for j in own] for own in lists]
    table, keys, teacher = table[[*range(9), *(9 + j for j in kept)]], keys[kept], teacher[kept]
    pairs = [(1, 4), (4, 1), (6, 3), (2, lists[2][1]), (5, lists[7][0]), (8, lists[1][1])]
    own = torch.tensor([own or [-1] * num_hard for own in lists])
    own[2, 1] = -1  # a hard negative that is a positive of its own query
    t = table.clone().requires_grad_()
    log_scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    options = dict(teacher_scores=teacher, **options_of(name, num_hard, negatives))
    expected = reference(t, keys, 9, torch.exp(-log_scale), negatives, own=lists, pairs=pairs, **options)
    expected.backward()
    for tiles, bounds in (((1024, 8192), [0, 9]), ((3, 4), [0, 1, 1, 4, 9])):
        sums, gradient = run_in_blocks(
            table,
            keys,
            9,
            bounds,
            temperature=math.exp(-1),
            negatives=negatives,
            own=own,
            pairs=torch.tensor(pairs),
            tile_queries=tiles[0],
            tile_documents=tiles[1],
            **options,
        )
        torch.testing.assert_close(sums.loss, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, t.grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(sums.grad_log_scale, log_scale.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_large_scores_do_not_overflow(name):
    table, keys, teacher = make_batch(6, 1)
    sums, gradient = run_in_blocks(
        table.float(),
        keys,
        6,
        [0, 6],
        temperature=1e-4,
        tile_documents=4,
        teacher_scores=teacher.float(),
        **OPTIONS[name],
    )
    assert torch.isfinite(sums.loss) and torch.isfinite(gradient).all()
    expected = reference(table, keys, 6, 1e-4, "all", teacher_scores=teacher, **OPTIONS[name])
    torch.testing.assert_close(sums.loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("negatives, num_hard", NEGATIVES)
@pytest.mark.parametrize("name", [n for n in OPTIONS if OPTIONS[n].get("teacher_loss", "scores") == "scores"])
def test_query_whose_every_negative_equals_its_positive_has_no_loss(negatives, num_hard, name):
    table, keys, teacher = make_batch(4, num_hard, equal_documents=False)
    keys[:, 0] = 1
    options = options_of(name, num_hard, negatives)
    sums, gradient = run_in_blocks(
        table, keys, 4, [0, 4], temperature=0.05, negatives=negatives, teacher_scores=teacher, **options
    )
    assert abs(sums.loss) < 1e-14 and gradient.abs().max() < 1e-13
    assert sums.num_with_negatives == 0 and sums.negative_similarity == 0 and sums.num_correct == 4


@pytest.mark.parametrize("options", [{}, dict(symmetric=True, distillation_weight=1.0) | PREFIXES])
def test_statistics(options):
    table, keys, teacher = make_batch(8, 2, equal_documents=False)
    sums, _ = run_in_blocks(
        table, keys, 8, [0, 3, 8], temperature=0.1, tile_documents=5, teacher_scores=teacher, **options
    )
    cosine = table[:8] @ table[8:].T
    positive = cosine.diagonal()
    others = cosine.clone()
    others[torch.arange(8), torch.arange(8)] = -2
    torch.testing.assert_close(sums.positive_similarity, positive.sum())
    torch.testing.assert_close(sums.negative_similarity, others.max(1).values.sum())
    torch.testing.assert_close(sums.margin, (positive - others.max(1).values).sum())
    assert sums.num_correct == (positive > others.max(1).values).sum() and sums.num_with_negatives == 8


@pytest.mark.parametrize("negatives, num_hard", NEGATIVES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_text_that_stands_in_many_places_gets_the_sum_of_their_gradients(negatives, num_hard, name):
    table, keys, teacher = make_batch(6, num_hard)
    rows = torch.randint(0, 8, (len(table),), generator=torch.Generator().manual_seed(1))  # queries are documents too
    distinct = table[:8].clone().requires_grad_()
    options = options_of(name, num_hard, negatives)
    expected = reference(
        distinct[rows], keys, 6, 0.05, negatives, teacher_scores=teacher, texts=rows.tolist(), **options
    )
    expected.backward()
    options = with_models(distinct[rows], options)
    models = {name: options.pop(name, None) for name in ("guide", "teacher")}
    result = contrastive_loss(
        distinct.detach(),
        keys,
        own_of_all(6, len(keys)),
        rows=rows,
        num_queries=6,
        first_query=0,
        last_query=6,
        temperature=torch.tensor(0.05, dtype=torch.float64),
        teacher_scores=teacher,
        **models,
        options=LossOptions(negatives=negatives, tile_queries=4, tile_documents=5, **options),
    )
    torch.testing.assert_close(result.sums.loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.gradient, distinct.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("negatives, num_hard", [("own", 2), ("pair", 3)])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_is_fetched_from_the_device(negatives, num_hard, name):
    """On the meta device whatever a host would have to wait for raises, and so do tensors on two devices."""
    table, keys, teacher = (tensor.to("meta") for tensor in make_batch(6, num_hard))
    options = with_models(table, options_of(name, num_hard, negatives))
    models = {name: options.pop(name, None) for name in ("guide", "teacher")}
    result = contrastive_loss(
        table,
        keys,
        own_of_all(6, len(keys)).to("meta"),
        rows=torch.arange(len(table), device="meta"),
        positive_pairs=torch.zeros(3, 2, dtype=torch.int64, device="meta"),
        num_queries=6,
        first_query=1,
        last_query=5,
        temperature=torch.tensor(0.05, device="meta", dtype=torch.float64),
        teacher_scores=teacher,
        **models,
        options=LossOptions(negatives=negatives, tile_queries=3, tile_documents=5, **options),
    )
    assert result.gradient.shape == table.shape and {value.device.type for value in result.sums} == {"meta"}


HARD = dict(hardness_mode="hard_negatives", hardness_strength=5.0)
# Theirs counts the positive a second time with document_query.
SAME_KIND = dict(directions=("query_document", "query_query", "document_document"))
PEERS = {
    "hardness": (dict(hardness_weight=5.0), "MultipleNegativesRankingLoss", HARD),
    "directions": (SAME_KIND, "MultipleNegativesRankingLoss", {}),
    "both": (SAME_KIND | dict(hardness_weight=5.0), "MultipleNegativesRankingLoss", HARD),
    "margins": (dict(distillation_weight=1.0, distillation_loss="margin_mse"), "MarginMSELoss", {}),
    "distributions": (dict(distillation_weight=1.0, distillation_temperature=2.0), "DistillKLDivLoss", {}),
}


@pytest.mark.parametrize("name", PEERS)
def test_equals_the_loss_of_sentence_transformers(name):
    from sentence_transformers import losses
    from sentence_transformers.util import pairwise_cos_sim

    options, peer, settings = PEERS[name]
    table, keys, teacher = make_batch(9, 2, equal_documents=False)
    # Theirs stand column by column: all first negatives, then all second ones.
    columns = table.clone().requires_grad_()
    queries, positives, negatives = columns[:9], columns[9:18], columns[18:].view(9, 2, -1)
    if peer == "MultipleNegativesRankingLoss":
        words = {"query": "query", "document": "doc"}
        names = [[words[word] for word in one.split("_")] for one in options.get("directions", DIRECTIONS[:1])]
        settings = settings | dict(scale=10.0, directions=tuple("_to_".join(one) for one in names))
    elif peer == "DistillKLDivLoss":
        settings = dict(similarity_fct=pairwise_cos_sim, student_temperature=0.1, teacher_temperature=2.0)
    else:
        settings = dict(similarity_fct=lambda a, b: pairwise_cos_sim(a, b) / 0.1)
    loss = getattr(losses, peer)(None, **settings)
    labels = torch.cat([teacher[:9, None], teacher[9:].view(9, 2)], 1)
    theirs = loss.compute_loss_from_embeddings([queries, positives, *negatives.unbind(1)], labels)
    if peer == "DistillKLDivLoss":
        theirs = theirs / 0.1**2  # which they multiply by
    theirs.backward()
    given = dict(temperature=0.1, teacher_scores=teacher)
    sums, gradient = run_in_blocks(table, keys, 9, [0, 4, 9], **given, **options)
    ours = sums.loss
    if "Distill" in peer or "Margin" in peer:  # ours are added to the contrastive loss
        plain, on_plain = run_in_blocks(table, keys, 9, [0, 9], temperature=0.1)
        ours, gradient = ours - plain.loss, gradient - on_plain
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-9)
    # Theirs is a function of the directions of the vectors alone.
    across = [one - (one * table).sum(1, keepdim=True) * table for one in (gradient, columns.grad)]
    torch.testing.assert_close(*across, rtol=1e-6, atol=1e-9)
