"""PyTorch's attention and encoder read weights without calling the layers.

The attention is refused by name; the encoder's fast path is switched off.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minilora
from minilora.targets import adapted_layers


def encoder(kind: str, activation: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.0, activation=activation, batch_first=True
    )
    model = layer if kind == "layer" else nn.TransformerEncoder(layer, 2)
    return model.eval()


def run(model: nn.Module, masked: bool) -> Tensor:
    """The outputs for a batch of lengths 7 and 4, without the padding, which is masked or not."""
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding if masked else None)
    assert y.shape[:2] in ((2, 7), (2, 4))
    return torch.cat([y[0, :7], y[1, :4]])


def fast_path(model: nn.Module) -> list[Any]:
    """The attributes that switch it, and our copies of them: (module, attribute, value)."""
    names = ("activation_relu_or_gelu", "use_nested_tensor", "_minilora_fused")
    modules = list(model.named_modules())
    return [(n, k, vars(m)[k]) for n, m in modules for k in names if k in vars(m)]


def is_off(model: nn.Module) -> bool:
    return not any(value for _, key, value in fast_path(model) if key != "_minilora_fused")


FEED_FORWARD = ["linear1", "linear2"]


# The dense model's own fast path warns.
nested_tensors = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@nested_tensors
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_every_adapter_of_an_encoder_counts_in_train_and_eval(
    kind: str, activation: str, masked: bool, quantized: bool
) -> None:
    model = encoder(kind, activation)
    if quantized:
        minilora.quantize(model, FEED_FORWARD)
    minilora.inject(model, r=4, targets=FEED_FORWARD)
    before = run(model, masked)
    for layer in adapted_layers(model).values():
        with torch.no_grad():
            layer.adapters["default"].B.normal_()
        changed = run(model, masked)
        # Without dropout, train and eval compute the same.
        train = run(model.train(), masked)
        model.eval()
        assert (changed - before).abs().max() > 1e-2
        # The same kernels in another order at most: 24 products and two norms of values near one.
        assert torch.allclose(changed, train, atol=1e-5)
        before = changed
    with minilora.disabled(model):
        base = run(model, masked)
    merged = run(minilora.merge(model), masked)
    # Sums of 24 products of values up to a few tens in float32, in another order, and a norm:
    # 24 * 50 * 2^-24 = 7e-5.
    assert torch.allclose(merged, before, atol=1e-4)
    assert not torch.allclose(base, before, atol=1e-2)


@nested_tensors
@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_inject_is_the_identity_on_an_encoder_and_eject_gives_the_fast_path_back(kind: str) -> None:
    model = encoder(kind)
    attributes, dense = fast_path(model), run(model, masked=True)
    minilora.inject(model, r=4, targets=FEED_FORWARD)
    assert is_off(model)
    # The fused kernel and the layers sum in another order: two norms, 24 products of values near
    # one in float32.
    assert torch.allclose(run(model, masked=True), dense, atol=1e-5)
    minilora.eject(model)
    assert fast_path(model) == attributes
    assert torch.equal(run(model, masked=True), dense)


def test_merge_gives_the_fast_path_back_and_a_quantized_encoder_keeps_off_it() -> None:
    model = encoder("encoder")
    attributes = fast_path(model)
    assert attributes

    minilora.merge(minilora.inject(model, r=4, targets=FEED_FORWARD))
    assert fast_path(model) == attributes

    minilora.quantize(model, FEED_FORWARD)
    off = fast_path(model)
    assert is_off(model)
    minilora.eject(minilora.inject(model, r=4, targets=FEED_FORWARD))
    assert fast_path(model) == off
    minilora.merge(minilora.inject(model, r=4, targets=FEED_FORWARD))
    assert fast_path(model) == attributes


def test_an_encoder_whose_fast_path_was_off_stays_off() -> None:
    model = nn.TransformerEncoder(encoder("layer"), 2, enable_nested_tensor=False).eval()
    assert isinstance(model, nn.TransformerEncoder)
    minilora.eject(minilora.inject(model, r=4, targets=FEED_FORWARD))
    assert model.use_nested_tensor is False


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y: Tensor = self.attention(h, h, h)[0]
        return y


@pytest.mark.parametrize("call", [minilora.inject, minilora.quantize])
@pytest.mark.parametrize("targets", ["all-linear", "out_proj"])
def test_multihead_attention_is_refused_by_name_with_a_way_out(call: Any, targets: str) -> None:
    model = Attends()
    keys = list(model.state_dict())
    message = r"^attention\.out_proj is part of nn\.Multi.*exclude=\('out_proj',\)"
    with pytest.raises(TypeError, match=message):
        call(model, targets=targets)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_the_way_out_works() -> None:
    model = minilora.inject(Attends(), r=2, exclude=("out_proj",))
    x = torch.randn(3, 5, 8)
    before = model(x)
    torch.nn.init.normal_(model.up.adapters["default"].B)
    assert list(adapted_layers(model)) == ["up"]
    assert not torch.allclose(model(x), before, atol=1e-2)
