"""Score networks: their interface, that no part of them is dead, and their published sizes."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from cldsde.images.networks import NETWORKS
from cldsde.pretrained import ncsnpp
from probes import generator
from tolerances import rounding

SIZE = 8
SMALL: dict[str, dict[str, Any]] = {
    "UNet": {"channels": (8, 16), "blocks": 1, "groups": 4},
    "NCSNpp": {"channels": (8, 16), "blocks": 1},
}
ATTENTIVE: dict[str, dict[str, Any]] = {
    "UNet": {"channels": (8, 16, 16), "groups": 4, "attention": (4, 2), "head_channels": 8},
    "NCSNpp": {"channels": (32, 32, 64), "blocks": 1, "attention": (4, 2)},
}
ROUNDING = rounding(100, dtype=torch.float32)  # tens of layers that each sum a thousand numbers

every_network = pytest.mark.parametrize("name", list(NETWORKS))
every_size = pytest.mark.parametrize("options", [SMALL, ATTENTIVE], ids=["small", "attentive"])


def make(name: str, shape: Any = (3, SIZE, SIZE), inputs=2, outputs=1, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = options if "channels" in options else {**SMALL[name], **options}
        return NETWORKS[name](shape, inputs, outputs, **given)


def awake(network: Any) -> Any:
    """Give weights of order 1/√fan-in, none of them zero: every part contributes."""
    g = generator(1)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise / p[0].numel() ** 0.5 if p.ndim > 1 else p + 0.1 * noise)
    return network


def states(batch: int = 3, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(2)
    return torch.randn(batch, channels, SIZE, SIZE, generator=g), torch.linspace(-8, 8, batch)


def idle_parameters(network: nn.Module) -> list[str]:
    """Parameters without a gradient; a bias of all keys changes no attention."""
    learnt = {key: p.grad for key, p in network.named_parameters() if p.requires_grad}
    constant = ("to_k.bias", "key.bias")
    return [
        key
        for key, gradient in learnt.items()
        if gradient is None or not (gradient.any() or key.endswith(constant))
    ]


@pytest.mark.parametrize(("inputs", "outputs", "data"), [(1, 1, 1), (3, 1, 3), (2, 2, 1)])
@every_network
def test_a_state_becomes_a_prediction_of_the_driven_components(name, data, inputs, outputs):
    network = awake(make(name, (data, SIZE, 2 * SIZE), inputs, outputs))
    z, clock = states(channels=inputs * data)
    out = network(torch.cat([z, -z], dim=-1), clock)
    assert out.shape == (3, outputs * data, SIZE, 2 * SIZE)
    assert out.isfinite().all()
    assert out.std() > 0


@every_size
@every_network
def test_an_untrained_network_predicts_zero(name, options):
    assert not make(name, classes=3, **options[name])(*states()).any()


def test_a_plain_u_net_has_the_weights_of_the_library():
    new = make("UNet", (3, 16, 16), channels=(8, 16), blocks=2, groups=4).state_dict()
    torch.manual_seed(0)
    sides = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    options = {"block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4}
    options |= {"in_channels": 6, "out_channels": 3, "add_attention": False, **sides}
    old = UNet2DModel(sample_size=(16, 16), **options)
    nn.init.zeros_(old.conv_out.weight)
    nn.init.zeros_(old.conv_out.bias)
    wanted = {f"network.{key}": value for key, value in old.state_dict().items()}
    assert list(new) == list(wanted)
    assert all(torch.equal(new[key], wanted[key]) for key in wanted)


@pytest.mark.covering
@pytest.mark.parametrize("label", ["classes", "null", None])
@every_size
@every_network
def test_every_parameter_has_a_gradient(name, label, options):
    """DistributedDataParallel rejects parameters without one."""
    network = awake(make(name, classes=None if label is None else 2, **options[name]))
    given = torch.tensor([0, 1, 2]) if label == "classes" else None
    network(*states(), given).square().sum().backward()
    assert idle_parameters(network) == []


def test_every_parameter_of_an_untrained_network_learns_once_its_output_does():
    network = make("NCSNpp", classes=2, fourier_scale=4.0, **ATTENTIVE["NCSNpp"])
    nn.init.normal_(network.network.up[-1].leave[-1].weight, generator=generator())
    network(*states()).square().sum().backward()
    assert idle_parameters(network) == []


@pytest.mark.parametrize(("name", "heights"), [("UNet", [4, 2, 4, 4]), ("NCSNpp", [4, 2, 4])])
def test_attention_is_at_the_requested_heights_and_in_the_middle(name, heights):
    network, seen = make(name, **{**ATTENTIVE[name], "attention": (4,)}), []
    for module in network.modules():
        if isinstance(module, Attention | ncsnpp.Attention):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    network(*states())
    assert seen == heights


@every_size
@every_network
def test_a_sample_depends_neither_on_its_batch_nor_on_the_layout_in_memory(name, options):
    """Nor on dropout, but in training."""
    network = awake(make(name, **options[name], dropout=0.5))
    z, clock = states(5)
    assert not torch.equal(network(z, clock), network(z, clock))
    together = network.eval()(z, clock)
    alone = torch.cat([network(z[i : i + 1], clock[i : i + 1]) for i in (4, 0, 2)])
    last = network.to(memory_format=torch.channels_last)
    turned = last(z.contiguous(memory_format=torch.channels_last), clock)
    tolerance = {"rtol": 0, "atol": ROUNDING * together.abs().max().item()}
    torch.testing.assert_close(together[[4, 0, 2]], alone, **tolerance)
    torch.testing.assert_close(together, turned, **tolerance)


@every_network
def test_labels_matter_to_their_own_sample_and_none_is_the_null_label(name):
    network = awake(make(name, classes=4))
    z, clock = states()
    first, second, null = (
        network(z, clock, torch.tensor(labels)) for labels in ([0, 1, 4], [0, 3, 4], [4, 4, 4])
    )
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(network(z, clock), null)
    assert network.network.class_embedding.num_embeddings == 5


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (None, torch.tensor([0, 0, 0]), "label must be None"),
        (4, torch.tensor([0.0, 1.0, 2.0]), r"int64 tensor \(3,\)"),
    ],
)
def test_labels_that_do_not_fit_are_rejected(classes, label, message):
    with pytest.raises(ValueError, match=message):
        make("UNet", classes=classes)(*states(), label)


@every_network
def test_the_cpu_never_waits_for_the_device(name):
    # Tensors on the device "meta" have no values: reading one is an error.
    with torch.device("meta"):
        network, z = make(name, classes=4, **ATTENTIVE[name]), torch.ones(2, 6, SIZE, SIZE)
        for label in (torch.ones(2).long(), None):
            assert network(z, torch.ones(2), label).shape == (2, 3, SIZE, SIZE)


@every_network
def test_recomputation_gives_the_same_gradients_and_keeps_less(name):
    options, found = {**ATTENTIVE[name], "dropout": 0.3, "classes": 3}, []
    for recomputed in (False, True):
        network = awake(make(name, gradient_checkpointing=recomputed, **options))
        kept, weights = {}, {p.data_ptr() for p in network.parameters()}

        def keep(x, kept=kept):
            kept[x.data_ptr()] = x.numel()
            return x

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = network(*states()).square().sum()
        loss.backward()
        gradients = [p.grad for p in network.parameters()]
        found.append((loss, gradients, sum(n for key, n in kept.items() if key not in weights)))
    (loss, gradients, kept_plain), (again, others, kept_less) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(*pair) for pair in zip(gradients, others, strict=True))
    assert kept_less < 0.6 * kept_plain


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UNet", {"channels": (8, 0)}, "channels.*: must"),
        ("UNet", {"dropout": 1.0}, "dropout.* must .*; got 1.0"),
        ("NCSNpp", {"dropout": 1.0}, "dropout.* must .*; got 1.0"),
        ("UNet", {"channels": (8, 16, 16, 16, 16, 16)}, "channels .* divisible by 32"),
        ("UNet", {"attention": (2,)}, r"heights of levels, \[8, 4\]; got \[2\]"),
        ("UNet", {"channels": (8, 12), "groups": 8}, r"groups must divide .* channels, \[8, 12\]"),
        ("UNet", {**ATTENTIVE["UNet"], "head_channels": 12}, r"divide the channels .*; got 12"),
        ("NCSNpp", {"channels": (6, 8)}, r"channels must be multiples of 4; got \[6, 8\]"),
        ("NCSNpp", {"channels": (8, 68)}, "channels must make equal groups.*a layer of 136"),
        ("NCSNpp", {"fir": False}, "fir must be True if inputs_enter is 'residual'"),
        ("NCSNpp", {"fourier_scale": 0.0}, "fourier_scale"),
    ],
)
def test_an_option_out_of_range_is_rejected(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **{**SMALL[name], **options})
