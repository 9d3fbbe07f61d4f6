"""Packed linear layers compute what the plain ones do, with the activation behind them, and leave alone what they must."""

import pytest
import torch
from tiny import make_model
from torch import nn
from transformers.activations import ACT2FN

from ds_embed import Embedder
from ds_embed.models.cpu import PackedLinear, multiplies_bfloat16, pack_linear_layers

TEXTS = [" ".join(f"word{i}" for i in range(n)) for n in range(1, 24)]
# Units in the last place of the largest value of a sum of 24 products.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
HAS_BFLOAT16 = multiplies_bfloat16()
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no bfloat16 products")
    ),
]


class Intermediate(nn.Module):
    """As transformers' BERT has it, and with `uses` as nobody should."""

    def __init__(self, activation, dtype=torch.float32, uses=lambda f, x: f(x)):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(24, 40).to(dtype)
        self.intermediate_act_fn = activation
        self.uses = uses

    def forward(self, values):
        return self.uses(self.intermediate_act_fn, self.dense(values))


class Gated(nn.Module):
    def __init__(self, activation, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = (nn.Linear(24, 40, bias=False).to(dtype) for _ in range(2))
        self.down_proj = nn.Linear(40, 24, bias=False).to(dtype)
        self.act_fn = activation

    def forward(self, values):
        return self.down_proj(self.act_fn(self.gate_proj(values)) * self.up_proj(values))


def exact(module, values):
    return module.double()(values.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_the_product(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias).to(dtype)
    values = torch.randn(3, 7, 24).to(dtype)
    got = PackedLinear(linear)(values)
    wanted = exact(linear, values)
    assert got.shape == (3, 7, 40) and got.dtype == dtype
    assert (got - wanted).abs().max() <= CLOSE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu"])
@pytest.mark.parametrize("kind", [Intermediate, Gated])
def test_the_activation_moves_into_the_layer(kind, name, dtype):
    module = kind(ACT2FN[name], dtype)
    values = torch.randn(11, 24).to(dtype)
    pack_linear_layers(module)
    got = module(values)
    activation = "intermediate_act_fn" if kind is Intermediate else "act_fn"
    assert type(getattr(module, activation)) is nn.Identity
    wanted = exact(kind(ACT2FN[name], dtype), values)
    assert (got - wanted).abs().max() <= CLOSE[dtype] * wanted.abs().max()


@pytest.mark.parametrize(
    "activation, uses",
    [
        (ACT2FN["quick_gelu"], lambda f, x: f(x)),  # oneDNN does not know it
        (nn.PReLU(), lambda f, x: f(x)),  # has weights
        (ACT2FN["gelu"], lambda f, x: f(x + 1)),  # is not called on the layer's output
        (ACT2FN["gelu"], lambda f, x: f(f(x))),  # is called twice
    ],
)
def test_an_activation_that_can_not_move_stays(activation, uses):
    module = Intermediate(activation, uses=uses)
    values = torch.randn(5, 24)
    wanted = module(values)
    pack_linear_layers(module)
    assert module.intermediate_act_fn is activation and type(module.dense) is PackedLinear
    assert torch.allclose(module(values), wanted, atol=1e-6)


def test_lora_matrices_and_other_precisions_stay():
    from peft import LoraConfig, get_peft_model

    module = get_peft_model(
        nn.Sequential(nn.Linear(24, 24)), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    )
    values = torch.randn(5, 24)
    wanted = module(values)
    pack_linear_layers(module)
    kinds = {name.split(".")[-2]: type(part) for name, part in module.named_modules() if name.endswith(".default")}
    assert kinds["lora_A"] is nn.Linear and kinds["lora_B"] is nn.Linear
    assert any(type(part) is PackedLinear for part in module.modules())
    assert torch.allclose(module(values), wanted, atol=1e-6)
    for dtype, is_packed in ((torch.float16, False), (torch.bfloat16, HAS_BFLOAT16)):
        other = nn.Sequential(nn.Linear(4, 4).to(dtype))
        pack_linear_layers(other)
        assert type(other[0]) is (PackedLinear if is_packed else nn.Linear)


@pytest.mark.parametrize("family, pooling", [("bert", "mean"), ("llama", "last")])
def test_an_embedder_is_packed_and_its_vectors_stay(tmp_path, family, pooling):
    make_model(tmp_path / family, family)
    options = {"device": "cpu", "dtype": "float32", "pooling": pooling, "max_length": 32}
    plain = Embedder.from_pretrained(tmp_path / family, keep_weights=True, **options)
    packed = Embedder.from_pretrained(tmp_path / family, **options)
    kinds = [{type(part) for part in embedder.encoder.modules()} for embedder in (plain, packed)]
    assert PackedLinear not in kinds[0] and nn.Linear not in kinds[1]
    difference = plain.encode_documents(TEXTS) - packed.encode_documents(TEXTS)
    assert abs(difference).max() < 1e-6
