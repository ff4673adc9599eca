"""The samplers that a bundle can be built with, by name: diffusers' schedulers and what is set of them."""

SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_3m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def make_scheduler(sampler, config):
    """The diffusers scheduler of a sampler's name, on the noise schedule of the model's own."""
    import diffusers  # takes seconds, and the names above need none of it

    name, overrides = SAMPLERS[sampler]
    return getattr(diffusers, name).from_config(config, **overrides)
