"""LoraLinear computes what PEFT's layer computes, forwards and backwards, and only where it has the formula."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from ds_embed.models.lora_linear import LoraLinear, use_lora_linear


def layers(kind=nn.Linear, bias=True, **options):
    """The same random layers with LoRA twice: PEFT's, and after use_lora_linear."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(kind(12, 20, bias=bias), nn.Tanh(), kind(20, 8, bias=bias))
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False, **options)
        made.append(get_peft_model(model, config))
    use_lora_linear(made[1])
    return made


def kinds(model):
    return {type(module) for module in model.modules() if isinstance(module, PeftLinear)}


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 12), (3, 5, 12), (0, 12)])
def test_values_and_gradients_are_those_of_peft(shape, bias, dtype, close):
    plain, ours = layers(bias=bias)
    assert kinds(plain) == {PeftLinear} and kinds(ours) == {LoraLinear}
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for model, precision in ((plain, torch.float64), (ours, dtype)):
        model.to(precision)
        inputs = values.to(precision).requires_grad_()
        outputs = model(inputs)
        (outputs * torch.linspace(-1, 1, 8)).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([outputs.detach(), inputs.grad, *gradients])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for wanted, got in zip(*results):
        assert got.dtype == dtype and (got - wanted).norm() <= close * wanted.norm()


def test_no_gradient_is_computed_for_an_input_that_needs_none():
    (_, ours) = layers()
    values = torch.randn(9, 12)
    ours(values).sum().backward()
    assert values.grad is None and all(p.grad is not None for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}])
def test_what_it_has_no_formula_for_stays_pefts(options):
    plain, ours = layers(**options)
    assert kinds(ours) == {PeftLinear}


def test_merged_and_disabled_layers_are_pefts_as_well():
    plain, ours = layers()
    values = torch.randn(9, 12)
    with plain.disable_adapter(), ours.disable_adapter():
        assert torch.equal(plain(values), ours(values))
    wanted = plain(values)
    ours.merge_adapter()
    assert torch.allclose(ours(values), wanted, atol=1e-5)
    ours.unmerge_adapter()
    merged = ours.merge_and_unload()
    assert torch.allclose(merged(values), wanted, atol=1e-5) and not kinds(merged)


def test_a_base_that_is_trained_stays_pefts():
    plain, _ = layers()
    for module in plain.modules():
        if type(module) is PeftLinear:
            module.base_layer.weight.requires_grad_()
    use_lora_linear(plain)
    assert kinds(plain) == {PeftLinear}


def test_several_adapters_and_adapters_by_name_are_pefts():
    plain, ours = layers()
    values = torch.randn(9, 12)
    for model in (plain, ours):
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
        model.eval()
    names = ["default"] * 4 + ["other"] * 5
    assert torch.allclose(plain(values, adapter_names=names), ours(values, adapter_names=names), atol=1e-6)
    for model in (plain, ours):
        model.base_model.set_adapter(["default", "other"])
    assert torch.allclose(plain(values), ours(values), atol=1e-6)
