"""The kernels that training on a CPU takes: dropout, and attention against a few lines in float64."""

from types import SimpleNamespace

import pytest
import torch

from ds_embed.models.cpu import CpuDropout, draw_kept, math_attention, use_cpu_dropout


def reference(query, key, value, mask, kept, scaling, dropout):
    """As the papers have it: every head by itself, in float64."""
    texts, heads, tokens, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    weights = scores.masked_fill(~mask, -torch.inf).softmax(3)
    if kept is not None:
        weights = weights * kept.view(texts, heads, tokens, tokens) / (1 - dropout)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kind", ["all", "padding", "causal", "window"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_and_its_gradient(groups, kind, dropout):
    texts, heads, tokens, dims = 3, 4, 7, 8
    torch.manual_seed(1)
    inputs = [torch.randn(texts, n, tokens, dims, dtype=torch.float64) for n in (heads, groups, groups)]
    place = torch.arange(tokens)
    mask = {
        "all": torch.ones(1, 1, 1, tokens, dtype=torch.bool),
        "padding": (place < torch.tensor([[7], [3], [1]]))[:, None, None],
        "causal": (place[:, None] >= place)[None, None],
        "window": ((place[:, None] - place).abs() < 3)[None, None],
    }[kind]
    given = None if kind in ("all", "causal") else mask
    seen, ours, wanted = torch.randn(texts, tokens, heads, dims, dtype=torch.float64), [], []
    for results, is_ours in ((ours, True), (wanted, False)):
        parts = [x.clone().requires_grad_() for x in inputs]
        torch.manual_seed(5)
        if is_ours:
            module = SimpleNamespace(training=True, is_causal=kind == "causal")
            output, _ = math_attention(module, *parts, given, dropout=dropout, scaling=0.25)
        else:
            shape = (texts * groups, heads // groups * tokens, tokens)
            kept = draw_kept(shape, dropout, torch.float64) if dropout else None
            output = reference(*parts, mask, kept, 0.25, dropout)
        (output * seen).sum().backward()
        results += [output.detach(), *(x.grad for x in parts)]
    for got, expected in zip(ours, wanted):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training, dtype", [(False, torch.bfloat16), (True, torch.float32)])
def test_where_sdpa_is_quicker_it_is_sdpa(training, dtype):
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=dtype).unbind()
    got, _ = math_attention(SimpleNamespace(training=training, is_causal=False), query, key, value, None)
    assert torch.equal(got, torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2))


def test_a_token_that_sees_nothing_is_no_nan():
    """Padding far from its text under a sliding window, as transformers' masks have it."""
    module = torch.nn.Module().train()
    inputs = [torch.randn(1, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 4:] = False
    mask[:, :, 5] = False
    mixed, _ = math_attention(module, *inputs, mask)
    mixed.sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in (mixed, *(one.grad for one in inputs)))
    shown, _ = math_attention(module, *(one[:, :, :4] for one in inputs), None, is_causal=False)
    torch.testing.assert_close(mixed[:, :4], shown, rtol=0, atol=1e-2)


def test_what_it_does_not_know_is_refused():
    query = torch.randn(2, 4, 5, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="softcap; choose eager"):
        math_attention(SimpleNamespace(training=True), query, query, query, None, softcap=30.0)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1e-4])
def test_share_of_what_is_dropped(probability):
    torch.manual_seed(3)
    kept = draw_kept((1000, 4001), probability, torch.float32)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    deviation = (probability / kept.numel()) ** 0.5  # of the share, and of that of pairs less than it times p ** 0.5
    assert abs((1 - kept.mean(dtype=torch.float64)) - probability) < 5 * deviation + 2**-17
    # Neighbours, of which four come from one number, are independent.
    dropped = 1 - kept.flatten()
    for distance in (1, 2, 3, 4, 4001):
        both = (dropped[distance:] * dropped[:-distance]).mean(dtype=torch.float64)
        assert (
            abs(both - probability**2)
            < 5 * (probability / kept.numel() ** 0.5 + probability * deviation) + 2**-16 * probability
        )


def test_dropout_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.25), torch.nn.Dropout(0.0))
    use_cpu_dropout(model)
    assert [type(m) for m in model] == [torch.nn.Linear, CpuDropout, torch.nn.Dropout]
    values = torch.randn(50, 40, requires_grad=True)
    drop = model[1]
    torch.manual_seed(2)
    output = drop(values)
    kept = output != 0
    assert 0.65 < kept.float().mean() < 0.85
    torch.testing.assert_close(output, values * kept / 0.75)
    output.sum().backward()
    torch.testing.assert_close(values.grad, kept / 0.75)
    torch.manual_seed(2)
    assert torch.equal(drop(values), output)
    assert torch.equal(drop.eval()(values), values)
