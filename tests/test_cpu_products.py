"""bfloat16 products through float32 are those of float32, rounded once, and nothing else of torch changes."""

import pytest
import torch
from tiny import make_model
from torch.nn.functional import linear, scaled_dot_product_attention

from ds_embed.models import cpu
from ds_embed.models.loading import find_model, load_encoder


@pytest.fixture
def through_float32():
    """The replaced kernels, on whatever CPU; torch's own come back where the CPU does not need them replaced."""
    library = cpu.multiply_through_float32()
    yield
    if cpu.multiplies_bfloat16():
        library._destroy()
        cpu.multiply_through_float32.cache_clear()


def draw(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).bfloat16() for shape in shapes]


def with_gradients(function):
    """A function of leaves that also returns their gradients for a gradient of ones to hundreds."""

    def run(*values):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        result = function(*leaves)
        result.backward(torch.arange(result.numel()).view(result.shape).fmod(199).add(1).to(result.dtype))
        return [result.detach(), *(leaf.grad for leaf in leaves)]

    return run


MATRICES = ((40, 300), (300, 50))
BATCHES = ((3, 40, 300), (3, 300, 50))
HEADS = ((2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 16))
MASK = torch.arange(33)[None, None, None] < torch.tensor([33, 20])[:, None, None, None]
PRODUCTS = {
    "mm": (lambda a, b: a @ b, MATRICES),
    "mm, transposed": (lambda a, b: a.T @ b.T, ((300, 40), (50, 300))),
    "bmm": (torch.bmm, BATCHES),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), ((40, 50), *MATRICES)),
    "addmm, a row": (torch.addmm, ((50,), *MATRICES)),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2), ((3, 40, 50), *BATCHES)),
    "linear": (with_gradients(lambda a, w, b: linear(a, w, b)), ((3, 40, 300), (50, 300), (50,))),
    "attention": (with_gradients(scaled_dot_product_attention), HEADS),
    "attention, causal": (with_gradients(lambda *v: scaled_dot_product_attention(*v, is_causal=True)), HEADS),
    "attention, mask": (with_gradients(lambda *v: scaled_dot_product_attention(*v, attn_mask=MASK)), HEADS),
}
# Of both passes: the linear layer's six, and its bias; query, key, value, and with them the output and its gradient; the mask.
NUM_OPERANDS = {"linear": 7, "attention": 8, "attention, causal": 8, "attention, mask": 10}


def spy(monkeypatch):
    """A list that gets the dtype of every value that a replaced kernel is given as bfloat16."""
    widened, widen = [], cpu._widened
    monkeypatch.setattr(cpu, "_widened", lambda v: widened.append(getattr(v, "dtype", None)) or widen(v))
    return widened


def rounded_once(function, values):
    found = function(*(value.float() for value in values))
    return [part.bfloat16() for part in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_float32_rounded_once(through_float32, monkeypatch, name):
    function, shapes = PRODUCTS[name]
    values = draw(*shapes)
    widened = spy(monkeypatch)
    found = function(*values)
    assert widened.count(torch.bfloat16) == NUM_OPERANDS.get(name, len(shapes))
    for got, wanted in zip(found if isinstance(found, list) else [found], rounded_once(function, values), strict=True):
        assert got.dtype == torch.bfloat16
        if (
            name.startswith("attention") and got is not found[0]
        ):  # a backward pass is given the output as it was rounded
            assert (got.float() - wanted.float()).norm() <= 4e-3 * wanted.float().norm()
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["addmm_", "baddbmm_"])
def test_a_sum_in_place_is_rounded_once_too(through_float32, monkeypatch, name):
    total, *factors = draw((40, 50), *MATRICES) if name == "addmm_" else draw((3, 40, 50), *BATCHES)
    (wanted,) = rounded_once(lambda c, *f: getattr(c.clone(), name)(*f, beta=0.5, alpha=2), [total, *factors])
    widened = spy(monkeypatch)
    got = getattr(total, name)(*factors, beta=0.5, alpha=2)
    assert widened.count(torch.bfloat16) == 3
    assert got is total and torch.equal(total, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.float16])
def test_other_numbers_are_multiplied_as_ever(through_float32, monkeypatch, dtype):
    monkeypatch.setattr(cpu, "_widened", None)  # would fail
    values = torch.arange(12).view(3, 4).to(dtype)
    assert torch.equal(values @ values.T, torch.tensor([[14, 38, 62], [38, 126, 214], [62, 214, 366]]).to(dtype))


@pytest.mark.parametrize("able", [True, False])
def test_loading_a_model_replaces_them_where_the_cpu_has_none_and_a_forward_pass_never(tmp_path, monkeypatch, able):
    make_model(tmp_path / "bert", "bert")
    calls = []
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: able)
    monkeypatch.setattr(cpu, "multiply_through_float32", lambda: calls.append(1))
    source = find_model(str(tmp_path / "bert"))
    kind = {"pooling": "mean", "bidirectional": True, "bf16": True, "attn_implementation": None}
    encoder = load_encoder(source, **kind, trust_remote_code=False)
    assert len(calls) == (0 if able else 1)
    encoder(torch.tensor([[5, 6, 7]]), torch.tensor([3]))
    assert len(calls) == (0 if able else 1)
