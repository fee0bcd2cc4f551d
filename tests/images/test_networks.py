"""Score networks: their interface, that no part of them is dead, and their published sizes."""

from __future__ import annotations

import copy
import inspect
import typing
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import downsample_2d
from diffusers.models.upsampling import upsample_2d
from torch import nn

from cldsde import CLD, MixedScore
from cldsde.images import networks
from cldsde.images.config import NetworkConfig
from cldsde.images.errors import SettingError
from cldsde.images.networks import NETWORKS, NCSNpp, UNet, parameter_count
from cldsde.pretrained import ncsnpp, resampling

SMALL: dict[str, dict[str, Any]] = {
    "UNet": {"channels": (8, 16), "blocks": 1, "groups": 4},
    "NCSNpp": {"channels": (8, 16), "blocks": 1},
}
ATTENTIVE: dict[str, dict[str, Any]] = {
    "UNet": {"channels": (8, 16, 16), "groups": 4, "attention": (8, 4), "head_channels": 8},
    "NCSNpp": {"channels": (32, 32, 64), "blocks": 1, "attention": (8, 4)},
}
CIFAR = {"channels": (128, 256, 256, 256), "blocks": 8, "attention": (16,), "fourier_scale": 16.0}
CELEBA = {
    "channels": (128, 128, 256, 256, 256, 256, 256),
    "attention": (16,),
    "fir": False,
    "inputs_enter": "once",
}

every_network = pytest.mark.parametrize("name", list(NETWORKS))


def make(name: str, *, data: int = 3, inputs: int = 2, outputs: int = 1, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]((data, 16, 16), inputs, outputs, **(options or SMALL[name]))


def awake(network: Any) -> Any:
    """With weights of order 1/√fan-in, none of them zero: every part says something."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise / p[0].numel() ** 0.5 if p.ndim > 1 else p + 0.1 * noise)
    return network


def states(batch: int = 3, channels: int = 6, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    clock = torch.linspace(-8, 8, batch)
    return torch.randn(batch, channels, size, size, generator=g), clock


class TestInterface:
    """What goes in and comes out."""

    @pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 1), (3, 1), (2, 2)])
    @pytest.mark.parametrize("data", [1, 3])
    @every_network
    def test_a_state_becomes_a_prediction_of_the_driven_components(
        self, name, data, inputs, outputs
    ):
        network = awake(make(name, data=data, inputs=inputs, outputs=outputs))
        out = network(*states(channels=inputs * data))
        assert out.shape == (3, outputs * data, 16, 16)
        assert out.isfinite().all()
        assert out.std() > 0

    @every_network
    def test_height_and_width_may_differ(self, name):
        network = NETWORKS[name]((1, 8, 16), 2, 1, **SMALL[name])
        assert network(torch.randn(2, 2, 8, 16), torch.zeros(2)).shape == (2, 1, 8, 16)

    @pytest.mark.parametrize("options", [SMALL, ATTENTIVE], ids=["small", "attentive"])
    @pytest.mark.parametrize("classes", [None, 3])
    @every_network
    def test_an_untrained_network_predicts_zero(self, name, classes, options):
        out = make(name, classes=classes, **options[name])(*states())
        assert torch.equal(out, torch.zeros_like(out))

    @every_network
    def test_an_untrained_mixed_score_is_its_reference(self, name):
        network, like = make(name, data=1), torch.zeros(())
        z, t = torch.randn(2, 2, 1, 16, 16), torch.tensor([0.2, 0.9])
        mixed = MixedScore(network, CLD(), like, like + 0.25)
        silent = MixedScore(_Silent(), CLD(), like, like + 0.25)
        torch.testing.assert_close(mixed(z, t), silent(z, t), rtol=0, atol=0)

    @every_network
    def test_options_are_keywords_with_annotations(self, name):
        parameters = inspect.signature(NETWORKS[name]).parameters
        hints = typing.get_type_hints(NETWORKS[name].__init__)
        assert list(parameters)[:3] == ["shape", "inputs", "outputs"]
        kinds = {parameters[p].kind for p in list(parameters)[3:]}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
        assert set(parameters) <= set(hints)
        assert parameters["classes"].default is None

    def test_options_of_the_published_network_are_checked_by_its_signature(self):
        config = NetworkConfig(name="NCSNpp", options={"channels": [8, 16], "fir": True})
        assert list(config.options["channels"]) == [8, 16]
        for options in ({"channels": [8], "fur": True}, {"channels": [8], "fir": 1}, {"fir": True}):
            with pytest.raises(SettingError, match=r"options\.(fur|fir|channels)"):
                NetworkConfig(name="NCSNpp", options=options)

    @pytest.mark.parametrize("blocks", [1, 2])
    def test_a_plain_u_net_has_the_weights_it_has_always_had(self, blocks):
        torch.manual_seed(5)
        new = UNet((3, 16, 16), 2, 1, channels=(8, 16), blocks=blocks, groups=4)
        torch.manual_seed(5)
        old = UNet2DModel(
            sample_size=(16, 16),
            in_channels=6,
            out_channels=3,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            layers_per_block=blocks,
            norm_num_groups=4,
            add_attention=False,
        )
        nn.init.zeros_(old.conv_out.weight)
        nn.init.zeros_(old.conv_out.bias)
        wanted = {f"network.{key}": value for key, value in old.state_dict().items()}
        got = new.state_dict()
        assert list(got) == list(wanted)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


class _Silent(nn.Module):
    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        return z[:, :1] * 0


class TestParts:
    """Every part of a network takes part."""

    @pytest.mark.parametrize("options", [SMALL, ATTENTIVE], ids=["small", "attentive"])
    @pytest.mark.parametrize("label", [None, "null", "classes"])
    @pytest.mark.parametrize("data", [1, 3])
    @every_network
    def test_every_parameter_has_a_gradient(self, name, data, label, options):
        classes = None if label is None else 2
        network = awake(make(name, data=data, classes=classes, **options[name]))
        z, clock = states(channels=2 * data)
        given = torch.tensor([0, 1, 2]) if label == "classes" else None
        network(z, clock, given).square().sum().backward()
        # DistributedDataParallel refuses parameters without a gradient.
        gradients = {key: p.grad for key, p in network.named_parameters() if p.requires_grad}
        assert [key for key, gradient in gradients.items() if gradient is None] == []
        # A number added to all keys changes no attention: its gradient is rounding.
        idle = [
            key
            for key, gradient in gradients.items()
            if not key.endswith(("to_k.bias", "key.bias")) and not bool((gradient != 0).any())
        ]
        assert idle == []

    @pytest.mark.parametrize("fourier_scale", [None, 4.0])
    def test_every_parameter_of_an_untrained_network_learns_once_its_output_does(
        self, fourier_scale
    ):
        network = make("NCSNpp", classes=2, fourier_scale=fourier_scale, **ATTENTIVE["NCSNpp"])
        assert isinstance(network, NCSNpp)
        nn.init.normal_(network.network.up[-1].leave[-1].weight)
        network(*states()).square().sum().backward()
        silent = [
            key
            for key, p in network.named_parameters()
            if not key.endswith(("to_k.bias", "key.bias"))
            and (p.grad is None or not bool((p.grad != 0).any()))
        ]
        assert silent == []

    @pytest.mark.parametrize(("name", "heights"), [("UNet", [8, 4, 8, 8]), ("NCSNpp", [8, 4, 8])])
    def test_attention_is_where_it_is_asked_for_and_in_the_middle(self, name, heights):
        network, seen = make(name, **{**ATTENTIVE[name], "attention": (8,)}), []
        for module in network.modules():
            if isinstance(module, Attention | ncsnpp._Attention):
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
        network(*states())
        assert seen == heights

    @pytest.mark.parametrize("options", [SMALL, ATTENTIVE], ids=["small", "attentive"])
    @every_network
    def test_a_sample_does_not_depend_on_its_batch(self, name, options):
        network = awake(make(name, **options[name])).eval()
        z, clock = states(5)
        together = network(z, clock)
        alone = torch.cat([network(z[i : i + 1], clock[i : i + 1]) for i in (4, 0, 2)])
        # Rounding of some tens of layers that each sum over a thousand numbers at most.
        scale = together.abs().max().item()
        torch.testing.assert_close(together[[4, 0, 2]], alone, rtol=0, atol=1e-5 * scale)

    @every_network
    def test_dropout_is_of_training_alone(self, name):
        network = awake(make(name, dropout=0.5, **SMALL[name]))
        z, clock = states()
        assert not torch.equal(network(z, clock), network(z, clock))
        network.eval()
        assert torch.equal(network(z, clock), network(z, clock))

    @pytest.mark.parametrize(
        ("name", "extra"), [("UNet", {}), ("NCSNpp", {}), ("NCSNpp", {"fourier_scale": 16.0})]
    )
    def test_clocks_are_told_apart_and_neighbours_are_close(self, name, extra):
        network = awake(make(name, **SMALL[name], **extra)).eval()
        clock = torch.linspace(-10, 10, 21)
        z = states(1)[0].expand(21, -1, -1, -1)
        out = network(z, clock).flatten(1)
        apart = torch.cdist(out, out) + torch.eye(21) * 1e9
        # The fastest feature turns by 50 radians a unit, by 2π·16·3 with Fourier features.
        near = (network(z, clock + 1e-4).flatten(1) - out).norm(dim=1)
        assert near.min() > 0
        assert near.max() < 0.1 * apart.min()

    @every_network
    def test_channels_last_is_harmless(self, name):
        network = awake(make(name, **ATTENTIVE[name])).eval()
        z, clock = states()
        plain = network(z, clock)
        turned = network.to(memory_format=torch.channels_last)
        out = turned(z.contiguous(memory_format=torch.channels_last), clock)
        # The same sums in another order.
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


class TestLabels:
    """Networks of labelled images."""

    @every_network
    def test_no_label_is_the_null_label_of_all(self, name):
        network = awake(make(name, classes=4, **SMALL[name]))
        z, clock = states()
        assert torch.equal(network(z, clock), network(z, clock, torch.full((3,), 4)))
        assert network.network.class_embedding.num_embeddings == 5

    @every_network
    def test_labels_matter_and_are_of_their_own_sample(self, name):
        network = awake(make(name, classes=4, **SMALL[name]))
        z, clock = states()
        first = network(z, clock, torch.tensor([0, 1, 4]))
        second = network(z, clock, torch.tensor([0, 3, 4]))
        assert torch.equal(first[[0, 2]], second[[0, 2]])
        assert not torch.equal(first[1], second[1])

    @every_network
    def test_a_network_without_classes_refuses_labels(self, name):
        with pytest.raises(ValueError, match="label must be None"):
            make(name)(*states(), torch.zeros(3, dtype=torch.int64))

    @pytest.mark.parametrize("label", [[0, 5, 1], [0, -1, 1]])
    @every_network
    def test_a_label_out_of_range_is_refused_on_the_host(self, name, label):
        network = make(name, classes=4, **SMALL[name])
        with pytest.raises(ValueError, match=r"label must lie in \[0, 4\]"):
            network(*states(), torch.tensor(label))

    @pytest.mark.parametrize(
        "label", [torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3, 1).long(), 1]
    )
    def test_what_are_no_labels_of_the_batch_is_refused(self, label):
        with pytest.raises(ValueError, match=r"label must be an int64 tensor \(3,\)"):
            make("UNet", classes=4, **SMALL["UNet"])(*states(), label)

    def test_a_label_out_of_range_on_a_device_spoils_its_own_image_alone(self):
        # What a device computes, where the host does not look.
        embedding = networks.ClassEmbedding(5, 3)
        rows = embedding(torch.tensor([0, 5, 4, -1]))
        assert rows.isnan().all(1).tolist() == [False, True, False, True]
        assert torch.equal(rows[[0, 2]], embedding.weight[[0, 4]])

    @every_network
    def test_the_host_never_waits_for_the_device(self, name):
        # Tensors on the device "meta" have no values: a look at one is an error.
        with torch.device("meta"):
            network = NETWORKS[name]((3, 16, 16), 2, 1, classes=4, **ATTENTIVE[name])
            z, clock, label = torch.ones(2, 6, 16, 16), torch.ones(2), torch.ones(2).long()
            assert network(z, clock, label).shape == (2, 3, 16, 16)
            assert network(z, clock).shape == (2, 3, 16, 16)


class TestFilter:
    """The anti-aliasing filter of NCSN++."""

    def test_it_is_that_of_the_library(self):
        x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
        kernel = (1, 3, 3, 1)
        # Rounding of sums of sixteen numbers.
        torch.testing.assert_close(resampling.Halve()(x), downsample_2d(x, kernel=kernel))
        torch.testing.assert_close(resampling.Double()(x), upsample_2d(x, kernel=kernel))

    def test_the_level_below_does_not_see_stripes_a_pixel_wide(self):
        # (1, 3, 3, 1) has a zero at the highest frequency, which striding alone would take for a
        # constant; off the edge, where it sees zeros beyond, it keeps a constant.
        network, seen = make("NCSNpp"), []
        first = network.network.down[0]
        first.filter.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(16, 16)
        for image in (stripes, torch.ones(16, 16)):
            network(image.expand(1, 6, 16, 16), torch.zeros(1))
        none, one = (x[..., 2:-2, 2:-2] for x in seen)
        assert torch.equal(none, torch.zeros(1, 6, 13, 13))
        assert torch.equal(one, torch.ones(1, 6, 13, 13))


class TestRecomputation:
    """Gradient checkpointing changes nothing but memory and time."""

    @every_network
    def test_the_gradients_are_the_same_bits_and_less_is_kept(self, name):
        options = {**ATTENTIVE[name], "dropout": 0.3, "classes": 3}
        found = []
        for recomputed in (False, True):
            network = awake(make(name, gradient_checkpointing=recomputed, **options))
            kept: dict[int, int] = {}
            weights = {p.data_ptr() for p in network.parameters()}

            def keep(x: torch.Tensor, kept: Any = kept, weights: Any = weights) -> torch.Tensor:
                if x.data_ptr() not in weights:
                    kept[x.data_ptr()] = x.numel()
                return x

            torch.manual_seed(0)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = network(*states()).square().sum()
            loss.backward()
            found.append((loss, [p.grad for p in network.parameters()], sum(kept.values())))
        (loss, gradients, kept_plain), (again, others, kept_less) = found
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
        assert kept_less < 0.6 * kept_plain

    @every_network
    def test_weights_have_the_same_names_and_values(self, name):
        plain = make(name, **ATTENTIVE[name]).state_dict()
        other = make(name, gradient_checkpointing=True, **ATTENTIVE[name]).state_dict()
        assert list(plain) == list(other)
        assert all(torch.equal(plain[key], other[key]) for key in plain)

    @every_network
    def test_a_copy_has_weights_of_its_own(self, name):
        # The average of the weights is a copy of the network.
        network = awake(make(name, gradient_checkpointing=True, **SMALL[name]))
        twin, (z, clock) = copy.deepcopy(network), states()
        with torch.no_grad():
            for p in network.parameters():
                p.zero_()
        assert twin(z, clock).abs().sum() > 0
        assert network(z, clock).abs().sum() == 0


class TestSizes:
    """The published configurations in their published size."""

    @pytest.mark.parametrize(
        ("size", "options", "count", "published"),
        [
            (32, CIFAR, 107_593_859, 107.6),
            (256, CELEBA, 65_466_371, 65.5),
            (256, {**CELEBA, "blocks": 4}, 103_073_795, 103.1),
        ],
        ids=["CIFAR-10", "CelebA-HQ-256", "CelebA-HQ-256, later"],
    )
    def test_parameters_are_as_many_as_published(self, size, options, count, published):
        with torch.device("meta"):
            network = NCSNpp((3, size, size), 2, 1, **options)
        assert parameter_count(network) == count
        assert round(count / 1e6, 1) == published

    def test_what_is_not_learnt_is_not_counted(self):
        layer = nn.Linear(3, 2)
        layer.bias.requires_grad_(False)
        assert parameter_count(layer) == 6


class TestRefusals:
    """What does not fit is refused before anything is built."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"channels": (8, 16, 16, 16, 16, 16)}, "channels .* divisible by 32"),
            ({"channels": ()}, "channels: must"),
            ({"channels": (8, 0)}, "channels: must"),
            ({"blocks": 0}, "blocks: must be .* 1; got 0"),
            ({"classes": 0}, "classes: must be .* 1; got 0"),
            ({"classes": True}, "classes: must be .*; got True"),
            ({"dropout": 1.0}, "dropout.* must .*; got 1.0"),
            ({"dropout": -0.1}, "dropout.* must .*; got -0.1"),
            ({"channels": (32, 32), "attention": (4,)}, r"heights of levels, \[16, 8\]; got \[4\]"),
        ],
    )
    @every_network
    def test_an_option_out_of_range_is_refused(self, name, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make(name, **{**SMALL[name], **options})

    @pytest.mark.parametrize("shape", [(3, 16), (3, 16, 0), (3, 16.0, 16)])
    @every_network
    def test_a_shape_that_is_none_of_images_is_refused(self, name, shape):
        with pytest.raises(ValueError, match="shape: must"):
            NETWORKS[name](shape, 2, 1, **SMALL[name])

    @every_network
    def test_no_inputs_are_refused(self, name):
        with pytest.raises(ValueError, match=r"inputs: must be .* 1; got 0"):
            make(name, inputs=0)

    def test_groups_that_do_not_divide_the_channels_are_refused(self):
        with pytest.raises(ValueError, match=r"groups must divide each of the channels, \[8, 12\]"):
            make("UNet", channels=(8, 12), groups=8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"channels": (6, 8)}, r"channels must be multiples of 4; got \[6, 8\]"),
            ({"channels": (8, 68)}, "channels must make equal groups.*a layer of 136"),
            ({"channels": (8, 8), "fir": False}, "fir must be True if inputs_enter is 'residual'"),
        ],
    )
    def test_options_of_ncsnpp_that_do_not_fit_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            make("NCSNpp", **options)

    def test_head_channels_must_divide_the_channels_of_attention(self):
        options = {"channels": (32, 64), "attention": (8,), "head_channels": 48}
        with pytest.raises(ValueError, match=r"divide the channels .*, \[64\]; got 48"):
            make("UNet", **options)

    @pytest.mark.parametrize("channels", [(4, 64), (64, 4, 60), (32, 96), (96, 160, 32)])
    def test_channels_that_are_allowed_can_be_built(self, channels):
        network = make("NCSNpp", channels=channels)
        assert network(*states()).shape == (3, 3, 16, 16)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
    def test_a_fourier_scale_out_of_range_is_refused(self, scale):
        with pytest.raises(ValueError, match="fourier_scale"):
            make("NCSNpp", fourier_scale=scale, **SMALL["NCSNpp"])
