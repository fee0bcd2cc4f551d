from comfy.samplers import KSAMPLER

from cldsde.pretrained import sample_k_diffusion


class CLDSampler:
    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "make"
    RETURN_TYPES = ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"process": (["CLD", "PSLD", "HOLD", "VPSDE"],)}}

    def make(self, process):
        return (KSAMPLER(sample_k_diffusion, {"process": process}),)


NODE_CLASS_MAPPINGS = {"CLDSampler": CLDSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"CLDSampler": "CLD sampler (cldsde)"}
