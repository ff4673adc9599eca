"""Stable Diffusion 1 and 2, and what their relatives share with them."""

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from transformers import CLIPTextModel, CLIPTokenizer

from nullspace.errors import NullSpaceError
from nullspace.layers import text_layers
from nullspace.models import load_whole, loading
from nullspace.names import JOINT, TEXT_ENCODER, TEXT_INPUT, tokenizer_of
from nullspace.single_file import load_from_file
from nullspace.stack import add_to_models, add_to_tokenizers


class StableDiffusion:
    """How a model of the family is recognised, loaded, trained and drawn with.

    Another family inherits from this one or a relative, sets the attributes that differ and overrides `recognises` and
    the methods that differ; all others are inherited. One instance, made without arguments, serves everybody
    (`get_family`), so it keeps nothing of a model.

    Its pipeline has `unet` (a `UNet2DConditionModel`), `vae` (an `AutoencoderKL`), `scheduler`, `vae_scale_factor`, and
    text encoders and tokenizers by the names below. When it is called, it takes what `sample` here and `draw` in
    nullspace/validation.py give it, and "latents" is among the values of its `callback_on_step_end`.

    Attributes:
        name (`str`): as --model_type and `FAMILIES` call it.
        title (`str`): as sentences call one of its models, with the article.
        evidence (`str`): what its UNet does that no other family's does, a verb first: "whose UNet <evidence>".
        marks (`tuple[str]`): classes of pipelines and schedulers that are its alone; a model with one of them and the
            UNet of another family is taken only at the user's word.
        pipeline (`type`): of diffusers, with `from_pretrained`, and `from_single_file` where such files are to be read.
        pipeline_options (`dict`): what the pipeline is loaded with.
        sampler (`type`), num_inference_steps (`int`): the scheduler, and the steps, that validation draws with.
        noise_scheduler (`type`): the scheduler that it is trained with, of which `loss` makes use.
        collection (`dict`): the builder's defaults, by the names of its flags; as the pipeline's own. "sampler" and
            "guidance_scale" are read from it besides, by trainings that build a bundle or need none.
        samplers (`tuple[str]` or `None`): those of `SAMPLERS` that draw with it, all if None.
        tags (`tuple[str]`): of model cards.
        text_encoders (`dict[str, type]`): classes, by their names in the pipeline, of which `TEXT_ENCODERS` has all.
        is_trainable (`bool`): whether the trainer has a loss for it. Cards of bundles go by it; what refuses a training
            is `settle`.
    """

    name = "sd"
    title = "a Stable Diffusion model"
    evidence = "takes no guidance embedding (time_cond_proj_dim)"
    marks = ()
    pipeline = StableDiffusionPipeline
    pipeline_options = {"safety_checker": None}
    sampler = DPMSolverMultistepScheduler
    num_inference_steps = 25
    collection = {"sampler": "ddim", "num_inference_steps": [25], "guidance_scale": 7.5, "timestep_groups": JOINT}
    samplers = None
    tags = ("stable-diffusion", "stable-diffusion-diffusers")
    noise_scheduler = DDPMScheduler
    text_encoders = {TEXT_ENCODER: CLIPTextModel}
    is_trainable = True

    def recognises(self, unet_config):
        """Whether a UNet, by its configuration (`dict`), is one of the family; where several say so, see `claims`."""
        keys = ("addition_embed_type", "time_cond_proj_dim")
        return all(unet_config.get(key) is None for key in keys)

    def claims(self, scheduler_config):
        """Whether a UNet that several families recognise is this one's, by the configuration (`dict`) of its scheduler.

        Where none claims it, it is of the first of them in `FAMILIES`.
        """
        return False

    # Loading

    def load_tokenizers(self, model):
        """The tokenizers of a `BaseModel`, by their names in the pipeline: `dict[str, CLIPTokenizer]`.

        Whatever loads them, `add_to_tokenizers` must be called with them: without it the words of --base_lora are lost.

        Raises:
            OSError, ValueError: as the library does, if one is missing.
        """
        names = map(tokenizer_of, self.text_encoders)
        tokenizers = {name: CLIPTokenizer.from_pretrained(model.folder, subfolder=name) for name in names}
        add_to_tokenizers(model, tokenizers)
        return tokenizers

    def load_models(self, model, parts=None):
        """Text encoders, UNet and VAE of a `BaseModel`, in float32: `dict[str, Module]`, as the pipeline calls them.

        Whatever loads them, `add_to_models` must be called with them: without it the LoRAs of --base_lora are lost.

        Args:
            parts (`Iterable[str]`): which of them; all by default.

        Raises:
            OSError, ValueError: if a file is missing or lacks weights.
        """
        kinds = {**self.text_encoders, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
        wanted = [part for part in kinds if parts is None or part in parts]
        in_file = [part for part in wanted if model.is_in_file(part)]
        others = kinds.keys() - set(in_file)
        loaded = load_from_file(self.pipeline, model.file, model.folder, in_file, others) if in_file else {}
        loaded |= {part: load_whole(kinds[part], model, part) for part in wanted if part not in loaded}
        add_to_models(self, model, loaded)
        return loaded

    def load_vae(self, model):
        """The VAE of a `BaseModel` anew, in float32: what has been cast to float16 has lost what that does not hold."""
        with loading(model.name):
            return self.load_models(model, ["vae"])["vae"]

    def load_pipeline(self, model, **components):
        """The pipeline of a `BaseModel`, with those components that are given, by name, and the others loaded."""
        parts = {*self.text_encoders, "unet", "vae"} - components.keys()
        models = self.load_models(model, parts)
        components = self.load_tokenizers(model) | components
        return self.pipeline.from_pretrained(model.folder, **self.pipeline_options, **models, **components)

    def load_noise_scheduler(self, folder):
        """The noise schedule that it is trained with, from a folder (`Path`) of the model."""
        return self.noise_scheduler.from_pretrained(folder, subfolder="scheduler")

    def needs_float32(self, vae_config):
        """Whether the VAE is known to overflow in float16; where it is not, it is tried."""
        return False

    # Training

    def settle(self, args):
        """Set the trainer's flags that are the family's own to their defaults.

        Raises:
            NullSpaceError: if one is another family's, or models of this one are not trained.
        """
        if args.lcm_loss:
            raise NullSpaceError(
                f"--lcm_loss is not for {self.title}, which {args.pretrained_model_name_or_path} is; leave it out."
            )

    def encode(self, text_encoders, tokens, clip_skip=0):
        """What the denoiser is told of prompts: `dict[str, Tensor (batch, ...)]`, its keyword arguments.

        `TEXT_INPUT` (batch, tokens, width) must be among them: what to_k and to_v of all cross-attention layers read.

        Args:
            text_encoders (`dict[str, Callable]`): by name, whatever they are wrapped in.
            tokens (`dict[str, dict]`): for each its `input_ids` and perhaps `attention_mask`, (batch, tokens).
            clip_skip (`int`): as in `sample`.
        """
        return {TEXT_INPUT: encode_tokens(text_encoders[TEXT_ENCODER], **tokens[TEXT_ENCODER], clip_skip=clip_skip)}

    def unread_layers(self, encoder, clip_skip=0):
        """How many of the last layers of the text encoder of this name give nothing that the denoiser is told."""
        return clip_skip

    def place(self, framings):
        """What the denoiser is told of where pictures were cut: keyword arguments, as those of `encode`.

        Args:
            framings (`Tensor`): (batch, 6), pixels, see `InstanceDataset`.
        """
        return {}

    def training_timesteps(self, noise_scheduler):
        """The timesteps to train at, `Sequence[int]`, ascending."""
        return range(noise_scheduler.config.num_train_timesteps)

    def denoiser(self, unet, config, guidance_scale):
        """The UNet as a function that `loss` calls: (noisy, timesteps, **conditions), with the prediction as `.sample`.

        Noisy latents and prediction are (batch, 4, h, w), timesteps (batch,), and the conditions those of `encode` and
        `place`.

        Args:
            unet (`Callable`): the model, whatever it is wrapped in.
            config (`dict`): its configuration.
            guidance_scale (`float`): that it is trained for, where it takes one.
        """
        return unet

    def loss(self, args):
        """The training's loss, a function of what `diffusion_loss` takes, but for `snr_gamma`; it gives a scalar."""
        return lambda *inputs, **conditions: diffusion_loss(*inputs, **conditions, snr_gamma=args.snr_gamma)

    # Drawing

    def prompt_arguments(self, pipeline, prompt, clip_skip=0):
        """How its pipeline is called with a prompt, or several, and a clip skip: keyword arguments."""
        return prompt_arguments(pipeline, prompt, clip_skip)

    def sample(
        self, pipeline, prompts, seeds, num_inference_steps, guidance_scale, resolution, on_step_end=None, clip_skip=0
    ):
        """Draw prompts (`list[str]`), as one batch, as users of the model do; what comes of it is dropped.

        Args:
            pipeline (`DiffusionPipeline`): of the model, with the sampler.
            seeds (`list[int]`): each prompt's noise comes from its own, drawn on the CPU, so that it depends on
                neither batch, process nor device.
            num_inference_steps (`list[int]`): the prompts are drawn with each of these numbers of steps.
            guidance_scale (`float`), resolution (`int`, pixels), on_step_end (`Callable`): as the pipeline takes them.
            clip_skip (`int`): how many of the text encoder's last layers are skipped.
        """
        for steps in num_inference_steps:
            pipeline(
                **self.prompt_arguments(pipeline, prompts, clip_skip),
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
                callback_on_step_end=on_step_end,
            )

    def call_arguments(self, guidance_scale):
        """What a user's call of the pipeline needs besides the prompt, as Python: ", name=value"."""
        return ""


# ---- The loss --------------------------------------------------------------------------------------------------------


def diffusion_loss(denoise, noise_scheduler, latents, timesteps, noise, snr_gamma=None, **conditions):
    """Mean squared error of the prediction (noise or velocity) for latents (batch, 4, h, w), as a scalar.

    DDPM, arXiv 2006.11239, eq. 14; v-prediction: arXiv 2202.00512, sec. 2.4. With `snr_gamma`, the loss of a picture
    is weighted by min(SNR, gamma) / SNR, or / (SNR + 1) for the velocity: arXiv 2303.09556, sec. 3.4.

    Args:
        denoise (`Callable`): the model, of noisy latents, timesteps (batch,) and `conditions`.
        timesteps (`Tensor`): (batch,), of the noise schedule.
        noise (`Tensor`): (batch, 4, h, w), standard normal.

    Raises:
        NullSpaceError: if the model predicts neither noise nor velocities.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = denoise(noisy, timesteps, **conditions).sample
    kind = noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise NullSpaceError(f"Models with prediction type {kind} cannot be trained.")
    target = noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps)
    if snr_gamma is None:
        return F.mse_loss(prediction.float(), target.float())
    snr = compute_snr(noise_scheduler, timesteps)
    weights = snr.clamp(max=snr_gamma) / (snr if kind == "epsilon" else snr + 1)
    losses = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return (losses * weights).mean()


# ---- Clip skip -------------------------------------------------------------------------------------------------------


def encode_tokens(text_encoder, input_ids, attention_mask=None, clip_skip=0):
    """Embeddings (batch, tokens, width) of tokens (batch, tokens), without the last `clip_skip` layers.

    As `StableDiffusionPipeline.encode_prompt` computes them: what the layer before those gives, through the final norm.
    """
    if not clip_skip:
        return text_encoder(input_ids, attention_mask=attention_mask)[0]
    output = text_encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    norm = text_layers(getattr(text_encoder, "module", text_encoder)).final_layer_norm  # below what DDP wraps
    return norm(output.hidden_states[-(clip_skip + 1)].to(norm.weight.dtype))


@torch.no_grad()
def prompt_arguments(pipeline, prompt, clip_skip=0):
    """How a pipeline is called with a prompt, or several, and a clip skip: keyword arguments.

    A pipeline's own `clip_skip` looks for `text_encoder.text_model`, which not every version of transformers has. As
    there, the negative prompt is encoded by all layers.
    """
    if not clip_skip:
        return {"prompt": prompt}
    tokens = pipeline.tokenizer(
        pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    tokens = tokens.to(pipeline.text_encoder.device)
    uses_mask = getattr(pipeline.text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask if uses_mask else None
    return {"prompt_embeds": encode_tokens(pipeline.text_encoder, tokens.input_ids, mask, clip_skip)}
