from comfy.samplers import KSAMPLER

import cldsde
from cldsde.pretrained import sample_k_diffusion
from cldsde.solvers import recommend

PROCESSES = ["CLD", "PSLD", "HOLD", "VPSDE"]


class CLDSampler:
    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "make"
    RETURN_TYPES = ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"process": (PROCESSES,)}}

    def make(self, process):
        return (KSAMPLER(sample_k_diffusion, {"process": process}),)


class CLDLevels:
    CATEGORY = "sampling/custom_sampling/schedulers"
    FUNCTION = "make"
    RETURN_TYPES = ("SIGMAS",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        steps = ("INT", {"default": 5, "min": 2, "max": 1000})
        return {"required": {"model": ("MODEL",), "process": (PROCESSES,), "steps": steps}}

    def make(self, model, process, steps):
        known = model.get_model_object("model_sampling")
        if any(kind.__name__ == "CONST" for kind in type(known).__mro__):
            raise ValueError("model is a flow-matching model: connect BasicScheduler instead")
        ends = float(known.sigma_min), float(known.sigma_max)
        sde = getattr(cldsde, process)()
        settings = recommend(sde, steps, shape=(4, 128, 128), levels=ends)
        return (settings.sigmas.float(),)


NODE_CLASS_MAPPINGS = {"CLDSampler": CLDSampler, "CLDLevels": CLDLevels}
NODE_DISPLAY_NAME_MAPPINGS = {
    "CLDSampler": "CLD sampler (cldsde)",
    "CLDLevels": "CLD levels (cldsde)",
}
