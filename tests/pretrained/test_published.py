"""Published checkpoints: what is loaded, and what is rejected."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from cldsde import CLD, PSLD
from cldsde.pretrained import load_cld_sgm, load_score_sde
from cldsde.pretrained.checkpoints import load_weights, read_checkpoint
from cldsde.pretrained.ncsnpp import NCSNpp
from cldsde.pretrained.published import recognise
from cldsde.pretrained.published_models import PUBLISHED
from cldsde.pretrained.published_score import Parameterisation, PublishedScore
from published_data import CLD_SGM, MODELS, SCORE_SDE, case, checkpoint, save_checkpoint


def saved(folder, contents):
    file = folder / "checkpoint.pth"
    torch.save(contents, file)
    return file


class TestLoading:
    """Weights of a checkpoint, key by key."""

    @pytest.mark.parametrize("name", list(MODELS))
    def test_every_averaged_weight_is_used_and_every_weight_is_loaded(self, name, tmp_path):
        loader = load_cld_sgm if name in CLD_SGM else load_score_sde
        score = loader(save_checkpoint(name, tmp_path), MODELS[name])
        theirs = case(name)["weights"].float()
        own = torch.cat([x.flatten() for x in score.network.state_dict().values()])
        # The weights of 1 × 1 convolutions are transposed; the codes store no other copy.
        assert torch.equal(own.sort().values, theirs.sort().values)
        assert not score.training
        assert not any(p.requires_grad for p in score.parameters())

    def test_weights_that_are_not_averaged_come_from_the_model(self, tmp_path):
        score = load_cld_sgm(save_checkpoint("cld_fourier", tmp_path), MODELS["cld_fourier"])
        assert torch.equal(score.network.embedding.frequencies, case("cld_fourier")["weights"][:4])

    def test_a_checkpoint_of_one_device_has_no_prefix(self, tmp_path):
        contents = checkpoint("vp")
        contents["model"] = {k.removeprefix("module."): x for k, x in contents["model"].items()}
        load_score_sde(saved(tmp_path, contents), MODELS["vp"])

    @pytest.mark.parametrize(
        ("family", "name", "count"),
        [
            ("cld-sgm", "cifar10", 107_593_859),
            ("cld-sgm", "cifar10_vpsde", 107_586_947),
            ("cld-sgm", "celeba_paper", 65_466_371),
            ("cld-sgm", "celeba_post_paper", 103_073_795),
            ("score-sde", "ve/cifar10_ncsnpp_deep_continuous", 107_586_947),
            ("score-sde", "vp/cifar10_ddpmpp_deep_continuous", 106_632_579),
            ("score-sde", "ve/celebahq_256_ncsnpp_continuous", 65_574_421),
        ],
    )
    def test_networks_have_as_many_parameters_as_published(self, family, name, count):
        # Counted in networks of the two codes; the papers say 107.6, 65.5 and 103 million.
        network = PUBLISHED[family][name].make_network("meta")
        assert sum(p.numel() for p in network.parameters()) == count


class TestRecognition:
    """Settings that belong to weights."""

    @staticmethod
    def like(model):
        """A checkpoint with the shapes of a model and no numbers."""
        network = model.make_network("meta")
        from cldsde.pretrained.checkpoints import Checkpoint, _published, _published_shape

        state = network.state_dict()
        weights = {
            w.name: torch.empty(_published_shape(state[w.own], w), device="meta")
            for w in _published(network)
        }
        if model.sigmas is not None:
            largest, smallest, count = model.sigmas
            weights["sigmas"] = torch.tensor(
                np.exp(np.linspace(np.log(largest), np.log(smallest), count))
            )
        return Checkpoint(weights, [], 1)

    @pytest.mark.parametrize("name", list(PUBLISHED["cld-sgm"]))
    def test_weights_of_cld_sgm_tell_the_settings(self, name):
        model = PUBLISHED["cld-sgm"][name]
        assert recognise(self.like(model), "x.pth", "cld-sgm") is model

    def test_noise_levels_tell_networks_of_one_size_apart(self):
        model = PUBLISHED["score-sde"]["ve/church_ncsnpp_continuous"]
        assert recognise(self.like(model), "x.pth", "score-sde") is model

    def test_folders_tell_vp_from_sub_vp(self, tmp_path):
        name = "subvp/cifar10_ddpmpp_deep_continuous"
        model = PUBLISHED["score-sde"][name]
        found = self.like(model)
        assert recognise(found, tmp_path / name / "checkpoint_15.pth", "score-sde") is model
        with pytest.raises(ValueError, match=r"config: must be given.*vp/cifar10_ddpmpp_deep_cont"):
            recognise(found, tmp_path / "checkpoint_15.pth", "score-sde")

    def test_an_unknown_name_is_rejected(self, tmp_path):
        with pytest.raises(ValueError, match=r"config: must be one of cifar10, .*; got 'imagenet'"):
            load_cld_sgm(save_checkpoint("cld_fourier", tmp_path), "imagenet")


class TestRejections:
    """Files that are no checkpoints of these networks."""

    MODEL = MODELS["cld_fourier"]

    def test_code_in_a_pickle_is_not_run(self, tmp_path):
        mark = tmp_path / "was-run"

        class Code:
            def __reduce__(self):
                return os.mkdir, (str(mark),)

        contents = checkpoint("cld_fourier") | {"step": Code()}
        for file in (tmp_path / "plain.pth", saved(tmp_path, contents)):
            if not file.exists():
                file.write_bytes(pickle.dumps(contents))
            with pytest.raises(ValueError, match="holds code, which is never run"):
                load_cld_sgm(file, self.MODEL)
        assert not mark.exists()

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_a_truncated_file_is_rejected(self, tmp_path, share):
        file = save_checkpoint("cld_fourier", tmp_path)
        whole = file.read_bytes()
        file.write_bytes(whole[: int(share * len(whole))])
        assert not zipfile.is_zipfile(file)
        with pytest.raises(ValueError, match=r"is truncated, no checkpoint of torch\.save"):
            load_cld_sgm(file, self.MODEL)

    @pytest.mark.parametrize("part", ["model", "ema", "step"])
    def test_a_checkpoint_without_a_part_is_rejected(self, tmp_path, part):
        contents = checkpoint("cld_fourier")
        del contents[part]
        with pytest.raises(ValueError, match=f"missing: {part}"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    def test_a_damaged_pickle_is_rejected(self, tmp_path):
        # Its first instruction takes from an empty stack.
        (tmp_path / "x.pth").write_bytes(b"\x80\x02s.")
        with pytest.raises(ValueError, match="or damaged; get it again"):
            load_cld_sgm(tmp_path / "x.pth", self.MODEL)

    @pytest.mark.parametrize("step", [None, "x", float("inf"), torch.zeros(2)])
    def test_a_step_that_is_no_number_is_rejected(self, tmp_path, step):
        contents = checkpoint("cld_fourier") | {"step": step}
        with pytest.raises(ValueError, match="step must be a whole number; got"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    def test_averaged_weights_without_a_list_are_rejected(self, tmp_path):
        contents = checkpoint("cld_fourier") | {"ema": {}}
        with pytest.raises(ValueError, match=r"ema\.shadow_params must be a list of tensors"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    def test_noise_levels_of_another_code_are_rejected(self, tmp_path):
        contents = checkpoint("cld_fourier")
        contents["model"]["module.sigmas"] = torch.zeros(0)
        with pytest.raises(ValueError, match="must hold no table sigmas; got 0 levels"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    def test_a_list_is_rejected(self, tmp_path):
        with pytest.raises(ValueError, match="must hold model, ema, step"):
            load_cld_sgm(saved(tmp_path, [torch.zeros(2)]), self.MODEL)

    def test_a_missing_weight_is_named(self, tmp_path):
        contents = checkpoint("cld_fourier")
        del contents["model"]["module.all_modules.5.Conv_1.bias"]
        with pytest.raises(
            ValueError, match=r"1 of \d+ weights are missing: all_modules\.5\.Conv_1"
        ):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    def test_an_unknown_weight_is_named(self, tmp_path):
        contents = checkpoint("cld_fourier")
        contents["model"]["module.all_modules.99.weight"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"unknown weights: all_modules\.99\.weight"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    def test_a_missing_averaged_weight_is_noticed(self, tmp_path):
        contents = checkpoint("cld_fourier")
        contents["ema"]["shadow_params"].pop()
        with pytest.raises(ValueError, match=r"must hold \d+ averaged weights.*; got"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    @pytest.mark.parametrize("part", ["model", "average"])
    def test_a_weight_of_another_shape_is_named(self, tmp_path, part):
        contents = checkpoint("cld_fourier")
        if part == "model":
            contents["model"]["module.all_modules.3.weight"] = torch.zeros(4, 3, 3, 3)
            place = r"all_modules\.3\.weight in model"
        else:
            contents["ema"]["shadow_params"][-1] = torch.zeros(7)
            place = r"bias in ema\.shadow_params"
        with pytest.raises(ValueError, match=rf"{place} of .* must have the shape"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x.fill_(torch.nan), "must be finite; it holds NaN"),
            (lambda x: x.int(), "real floating-point numbers; got torch.int32"),
            (lambda x: x.cfloat(), "real floating-point numbers; got torch.complex64"),
            (lambda x: x.to_sparse(), "must be a dense tensor"),
            (lambda x: x.to("meta"), "must be a dense tensor"),
        ],
    )
    @pytest.mark.parametrize("part", ["model", "average"])
    def test_a_weight_that_is_no_real_number_is_named(self, tmp_path, part, change, message):
        contents, average = checkpoint("cld_fourier"), part == "average"
        held = contents["ema"]["shadow_params"] if average else contents["model"]
        key = -1 if average else "module.all_modules.3.weight"
        held[key] = change(held[key].clone())
        place = r"bias in ema\.shadow_params" if average else r"all_modules\.3\.weight in model"
        with pytest.raises(ValueError, match=rf"path: .*{place} of .* {message}"):
            load_cld_sgm(saved(tmp_path, contents), self.MODEL)

    @pytest.mark.parametrize("change", [lambda x: x.cfloat(), lambda x: x * torch.nan])
    def test_noise_levels_that_are_no_real_numbers_are_rejected(self, tmp_path, change):
        contents = checkpoint("vp")
        contents["model"]["module.sigmas"] = change(contents["model"]["module.sigmas"])
        with pytest.raises(ValueError, match=r"path: .*must hold the table sigmas"):
            load_score_sde(saved(tmp_path, contents), MODELS["vp"])

    def test_a_folder_is_no_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match=r"path: .*is a folder; name the file in it"):
            read_checkpoint(tmp_path)

    def test_a_checkpoint_of_another_network_is_rejected(self, tmp_path):
        file = save_checkpoint("vp_mixed", tmp_path)
        wider = dataclasses.replace(
            MODELS["vp_mixed"], network={**MODELS["vp_mixed"].network, "channels": (8, 8)}
        )
        with pytest.raises(ValueError, match="must have the shape"):
            load_cld_sgm(file, wider)
        with pytest.raises(
            ValueError, match=r"is of another network than expected; \d+ of \d+ weights are missing"
        ):
            load_cld_sgm(file, MODELS["cld_positional"])

    def test_noise_levels_of_another_process_are_rejected(self, tmp_path):
        model = dataclasses.replace(SCORE_SDE["ve_fourier"], sigmas=(90.0, 0.01, 1000))
        with pytest.raises(ValueError, match=r"table sigmas of \(90.0, .*got 1000 levels up to 50"):
            load_score_sde(save_checkpoint("ve_fourier", tmp_path), model)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.pth"):
            read_checkpoint(tmp_path / "nothing.pth")

    def test_weights_are_untouched_after_a_rejection(self, tmp_path):
        contents = checkpoint("cld_fourier")
        contents["ema"]["shadow_params"][-1] = torch.zeros(7)
        network = self.MODEL.make_network()
        before = {key: x.clone() for key, x in network.state_dict().items()}
        with pytest.raises(ValueError, match="must have the shape"):
            load_weights(network, read_checkpoint(saved(tmp_path, contents)), "x")
        assert all(torch.equal(x, before[key]) for key, x in network.state_dict().items())


class TestScore:
    """The score as solvers and trainings call it."""

    def make(self, name="cld_fourier"):
        model = MODELS[name]
        network = model.make_network()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        return PublishedScore(network, model.make_process(), model.parameterisation)

    def test_predictions_agree_with_the_score(self):
        score, g = self.make(), torch.Generator().manual_seed(0)
        z, t = torch.randn(2, 2, 1, 8, 8, generator=g), torch.tensor([0.2, 0.9])
        root = score.sde.marginal(t.double()).root[:, -1, -1].float()
        noise = score(z, t, prediction="noise")
        expected = -root[:, None, None, None, None] * score(z, t)
        # Rounding of single precision.
        torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)
        assert score.data_prediction(z, t).shape == (2, 1, 8, 8)

    def test_one_time_is_the_time_of_all(self):
        score, z = self.make("ve_levels"), torch.randn(3, 1, 1, 8, 8)
        torch.testing.assert_close(score(z, 0.5), score(z, torch.full((3,), 0.5)), rtol=0, atol=0)

    def test_numerical_eps_keeps_the_gain_finite_near_the_data(self):
        how = Parameterisation(code="cld-sgm", mixed=True, numerical_eps=1e-9)
        score = PublishedScore(NCSNpp((2, 8, 8), 1, channels=(4, 4)), CLD(), how)
        found = score._coefficients(torch.tensor([1e-12], dtype=torch.float64))
        # Σ_vv(0) = γM = 0.01, and all but eps of it is known from x: ℓ = 1/√(2 eps) there.
        assert found.gain.item() == pytest.approx(-1 / (1e-9 + 1e-2) ** 0.5, rel=1e-3)
        assert found.reference.item() == pytest.approx(100, rel=1e-3)

    def test_several_driven_components_are_rejected(self):
        how = Parameterisation(code="cld-sgm")
        with pytest.raises(ValueError, match="sde must have one driven component"):
            PublishedScore(torch.nn.Identity(), PSLD(), how)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"code": "edm"}, "code must be"),
            ({"code": "score-sde-vp", "mixed": True}, "mixed and numerical_eps are options"),
            ({"code": "cld-sgm", "levels": 1000}, "levels must be None for 'cld-sgm'"),
            ({"code": "score-sde-ve", "levels": 1}, "at least 2 otherwise; got 1"),
            ({"code": "cld-sgm", "numerical_eps": -1.0}, "numerical_eps must be"),
        ],
    )
    def test_options_that_a_code_does_not_have_are_rejected(self, options, message):
        with pytest.raises(ValueError, match=message):
            Parameterisation(**options)
