"""The mathematics and the bundle, against plain numpy in float64 and against diffusers itself."""

import copy
import json
import math
import re
import shutil
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import build_nullspace
import nullspace_utils
from nullspace.audit import audit, leakage, predicted_drift, verdict
from nullspace.bundle import Bundle, check_files
from nullspace.errors import NullSpaceError
from nullspace.families import recognise
from nullspace.fingerprints import fingerprint, fingerprints
from nullspace.layers import attention_inputs
from nullspace.lora import LoraLayer, load_lora
from nullspace.moments import SecondMoments
from nullspace.names import FORMAT_VERSION, JOINT, LORA_NAME, TEXT_INPUT
from nullspace.projector import NullSpaceProjector, Protected
from nullspace.spectrum import Spectrum
from nullspace.timesteps import timestep_groups
from train_world import CONTEXT


LAYERS = {
    "cross": re.compile(r"\.attn2\.to_(q|k|v|out\.0)$"),
    "self": re.compile(r"\.attn1\.to_(q|k|v|out\.0)$"),
    "all": re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$"),
}
TEXT_LAYER = re.compile(r"\.attn2\.to_[kv]$")
BATCHES = [["a photo of a red star", "a small blue heart"], ["a green ring on a white background", "a moon"]]
STEPS = 6
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


# ---- What the tests compare with -------------------------------------------------------------------------------------


def array(tensor):
    return tensor.detach().double().numpy()


def distance(found, expected):
    """Relative distance in the Frobenius norm, in float64."""
    found, expected = (array(x) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def random_basis(size, seed):
    """A random orthonormal basis (size, size) in float64."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def random_spectrum(size, seed=0, decades=6, tokens=1000):
    """A second moment (size, size) in float64 with eigenvalues over that many decades, and its spectrum."""
    basis = random_basis(size, seed)
    moment = (basis * np.logspace(1, 1 - decades, size)) @ basis.T
    return moment, Spectrum.from_sum(torch.from_numpy(moment * tokens), tokens)


def leading(moment, rank):
    """The leading eigenvectors (in, rank) of a second moment."""
    return np.linalg.eigh(moment)[1][:, ::-1][:, :rank]


def is_energy_rank(rank, moment, energy):
    """Whether that many leading eigenvalues are the fewest that hold a share of the trace, to float32's rounding."""
    values = np.linalg.eigvalsh(moment)[::-1]
    shares = np.array([values[:k].sum() for k in (rank, rank - 1)]) / values.sum()
    return shares[0] > energy - 3e-6 and shares[1] < energy + 3e-6


class World:
    """A tiny pipeline, the inputs of all its attention projections while it drew pictures, and what was collected.

    `passes` holds a (batch, timestep, {module: input (batch, tokens, in)}) for each forward pass of the UNet;
    `moments` the `SecondMoments` of both batches by the kind of attention, and `halves` those of each batch alone.
    """

    def __init__(self, folder):
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.unet = self.pipeline.unet
        self.pipeline.scheduler.set_timesteps(STEPS)
        self.timesteps = sorted(self.pipeline.scheduler.timesteps.tolist())
        self.groups = timestep_groups(self.timesteps, 3)
        self.passes = []
        inputs = {kind: attention_inputs(self.unet, kind) for kind in LAYERS}
        self.moments = {kind: SecondMoments(self.unet, inputs[kind], self.group_of()) for kind in LAYERS}
        self.halves = [SecondMoments(self.unet, inputs["all"], self.group_of()) for _ in BATCHES]
        for batch, prompts in enumerate(BATCHES):
            with ExitStack() as stack:
                for collector in [*self.moments.values(), self.halves[batch]]:
                    stack.enter_context(collector.collect())
                    collector.start_batch()
                self.record(batch, prompts)

    def group_of(self):
        return {timestep: group["name"] for group in self.groups for timestep in group["timesteps"]}

    def record(self, batch, prompts):
        def begin(unet, args):
            self.passes.append((batch, int(args[1]), {}))

        def keep(name):
            return lambda module, args, output: self.passes[-1][2].__setitem__(name, args[0].detach().clone())

        handles = [self.unet.register_forward_pre_hook(begin)]
        for name, module in self.unet.named_modules():
            if LAYERS["all"].search(name):
                handles.append(module.register_forward_hook(keep(name)))
        self.pipeline(
            prompts,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(batch),
            output_type="latent",
        )
        for handle in handles:
            handle.remove()

    def inputs(self, name, timesteps=None, batches=(0, 1)):
        """What one layer saw, (tokens, in) in float64; what the text encoder says to each batch is taken once."""
        chosen, seen = [], set()
        for batch, timestep, inputs in self.passes:
            if batch not in batches or (TEXT_LAYER.search(name) and batch in seen):
                continue
            if TEXT_LAYER.search(name) or timesteps is None or timestep in timesteps:
                seen.add(batch)
                chosen.append(array(inputs[name].flatten(0, 1)))
        return np.concatenate(chosen)

    def moment(self, name, timesteps=None, batches=(0, 1)):
        """C (in, in) of one layer in float64."""
        x = self.inputs(name, timesteps, batches)
        return x.T @ x / len(x)

    def bundle(self, attention="all", moments=None, groups=None, **config):
        inputs = attention_inputs(self.unet, attention)
        modules = {}
        for name, source in inputs.items():
            out_features, in_features = self.unet.get_submodule(name).weight.shape
            modules[name] = {"input": source, "in_features": in_features, "out_features": out_features}
        config = {
            "model_type": "sd",
            "base_model": {"id": "tiny/model", "revision": None, "fingerprint": fingerprints(unet=self.unet)},
            "modules": modules,
            "prompts": {"source": "test", "count": 2, "sha256": "0" * 64, "examples": ["a star"]},
            "attention": attention, "sampler": "ddim", "num_inference_steps": [STEPS], "guidance_scale": 5.0,
            "resolution": 32, "seed": 0, "prediction_type": "epsilon", "command": "build", "versions": {"torch": "2"},
            "mixed_precision": "no",
            **config,
        }  # fmt: skip
        return Bundle.from_moments(moments or self.moments[attention], groups or self.groups, config)

    def joint_bundle(self):
        """A bundle with all timesteps in one group."""
        moments = SecondMoments(self.unet, self.moments["all"].inputs, {})
        for (group, source), total in self.moments["all"].sums.items():
            key = (group if group == TEXT_INPUT else JOINT, source)
            moments.sums[key] = moments.sums.get(key, 0) + total
            moments.tokens[key] = moments.tokens.get(key, 0) + self.moments["all"].tokens[group, source]
        return self.bundle(moments=moments, groups=timestep_groups(self.timesteps, 1))

    def unet_with_lora(self, rank=4, seed=0, up=0.0, **config):
        """A copy of the UNet with trainable LoRA layers on all attention projections; B is random if `up` is not 0."""
        torch.manual_seed(seed)
        unet = copy.deepcopy(self.unet).requires_grad_(False)
        options = {"lora_alpha": rank, "init_lora_weights": "gaussian", "target_modules": TARGETS, **config}
        unet.add_adapter(LoraConfig(r=rank, **options))
        for name, parameter in unet.named_parameters():
            if up and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=up)
        return unet


world_of = cache(World)


@pytest.fixture(params=["tiny_sd1", "tiny_sd2"])
def any_world(request):
    return world_of(request.getfixturevalue(request.param))


@pytest.fixture
def world(tiny_sd1):
    return world_of(tiny_sd1)


@pytest.fixture
def bundle(world):
    return world.bundle()


@pytest.fixture
def saved(bundle, tmp_path):
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def save_lora(folder, unet, dtype=torch.float32, **options):
    state_dict = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    state_dict = {key: value.detach().to(dtype).contiguous() for key, value in state_dict.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state_dict, **options)


# ---- Which layers, and which of them share an input ------------------------------------------------------------------


@pytest.mark.parametrize("attention", LAYERS)
def test_every_attention_projection_of_the_kind_is_covered(any_world, attention):
    expected = {name for name, _ in any_world.unet.named_modules() if LAYERS[attention].search(name)}
    assert set(attention_inputs(any_world.unet, attention)) == expected
    assert len(expected) == 7 * 4 * (2 if attention == "all" else 1)  # 2 + 1 + 4 transformers
    with_lora = copy.deepcopy(any_world.unet)
    with_lora.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    assert attention_inputs(with_lora, attention) == attention_inputs(any_world.unet, attention)


def test_inputs_that_share_a_name_are_equal_and_others_are_not(any_world):
    inputs = attention_inputs(any_world.unet, "all")
    sharing = {}
    for name, source in inputs.items():
        sharing.setdefault(source, []).append(name)
    assert sorted({len(names) for names in sharing.values()}) == [1, 3, 14]
    assert set(sharing[TEXT_INPUT]) == {name for name in inputs if TEXT_LAYER.search(name)}
    texts = {}  # of each batch, the same at all timesteps
    for batch, _, seen in any_world.passes:
        text = texts.setdefault(batch, seen[sharing[TEXT_INPUT][0]])
        for source, names in sharing.items():
            assert all(torch.equal(seen[name], text if source == TEXT_INPUT else seen[source]) for name in names)
        owners = [names[0] for names in sharing.values()]
        for index, first in enumerate(owners):
            for second in owners[:index]:
                assert seen[first].shape != seen[second].shape or not torch.equal(seen[first], seen[second])


def test_models_of_other_kinds_are_refused(tiny_sd1, tmp_path):
    """What is Stable Diffusion and what a Latent Consistency Model is tested in `test_lcm.py`."""
    assert recognise(tiny_sd1).name == "sd"
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.35.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(NullSpaceError, match="Diffusion3Pipeline; only .*StableDiffusionPipeline"):
        recognise(tmp_path)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(NullSpaceError, match=f"The base model {tmp_path} cannot be had"):
        recognise(tmp_path)


# ---- Second moments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", LAYERS)
def test_second_moments_are_those_of_the_inputs_that_the_layers_saw(any_world, attention):
    moments = any_world.moments[attention]
    inputs = attention_inputs(any_world.unet, attention)
    for group in any_world.groups:
        collected = moments.group(group["name"])
        assert set(collected) == set(inputs.values()) - {TEXT_INPUT}
        for name, source in inputs.items():
            if source != TEXT_INPUT:
                x = any_world.inputs(name, group["timesteps"])
                assert collected[source][1] == len(x) > 0
                assert distance(collected[source][0], x.T @ x) < 1e-5
    assert set(moments.group(TEXT_INPUT)) == {TEXT_INPUT} & set(inputs.values())


@pytest.mark.parametrize("attention", ["cross", "all"])
def test_the_text_is_counted_once_a_batch_with_the_empty_prompt(any_world, attention):
    pipeline = any_world.pipeline
    encoded = [pipeline.encode_prompt(prompts, "cpu", 1, True) for prompts in BATCHES]
    x = array(torch.cat([embedding.flatten(0, 1) for pair in encoded for embedding in pair]))
    total, tokens = any_world.moments[attention].group(TEXT_INPUT)[TEXT_INPUT]
    assert tokens == len(x) == 2 * 2 * 2 * CONTEXT
    assert distance(total, x.T @ x) < 1e-5


def test_nothing_is_collected_outside_the_context(world):
    moments = SecondMoments(world.unet, attention_inputs(world.unet, "all"), world.group_of())
    text, latents = torch.randn(1, 16, 32), torch.randn(1, 4, 8, 8)
    with moments.collect(), torch.no_grad():
        moments.start_batch()
        world.unet(latents, timestep=world.timesteps[0], encoder_hidden_states=text)
    before = dict(moments.tokens)
    with torch.no_grad():
        world.unet(latents, world.timesteps[0], text)
    assert moments.tokens == before
    assert {group for group, _ in before} == {world.groups[0]["name"], TEXT_INPUT}
    with moments.collect(), torch.no_grad():  # no new batch: the text was counted
        world.unet(latents, torch.tensor(world.timesteps[0]), text)
    doubled = {key: count * (1 if key[0] == TEXT_INPUT else 2) for key, count in before.items()}
    assert moments.tokens == doubled


def test_moments_of_a_model_with_lora_layers_are_those_of_the_model(world):
    unet = world.unet_with_lora()  # B is zero: the model answers as before
    moments = SecondMoments(unet, attention_inputs(unet, "all"), {timestep: JOINT for timestep in range(1000)})
    text, latents = torch.randn(1, 16, 32), torch.randn(1, 4, 8, 8)
    plain = SecondMoments(world.unet, moments.inputs, moments.group_of)
    for collector in (moments, plain):
        with collector.collect(), torch.no_grad():
            collector.start_batch()
            collector.unet(latents, 500, text)
    assert moments.sums.keys() == plain.sums.keys()
    assert all(distance(total, plain.sums[key]) < 1e-5 for key, total in moments.sums.items())


def test_sums_of_all_processes_are_added():
    moments = SecondMoments(None, {}, {})
    moments.add("first", "a", torch.ones(3, 2))
    moments.add("second", "b", torch.ones(5, 4))
    moments.mirror()
    order = []
    moments.reduce(lambda tensor: order.append(tuple(tensor.shape)) or 2 * tensor)  # two processes with the same inputs
    assert order == [(2, 2), (), (4, 4), ()]
    for name, source, size, tokens in (("first", "a", 2, 6), ("second", "b", 4, 10)):
        total, counted = moments.group(name)[source]
        assert torch.equal(total, torch.full((size, size), float(tokens)))
        assert counted == tokens
        assert isinstance(counted, int)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 9, 320, 321])
def test_every_entry_of_a_sum_is_there(size):
    moments, parts = SecondMoments(None, {}, {}), torch.randn(2, 50, size)
    for part in parts:
        moments.add("g", "layer", part)
        moments.mirror()  # what is added later is mirrored, too
    total, _ = moments.group("g")["layer"]
    assert torch.equal(total, total.T)
    assert distance(total, array(parts.flatten(0, 1)).T @ array(parts.flatten(0, 1))) < 1e-6


def test_half_precision_inputs_are_summed_in_float32():
    moments = SecondMoments(None, {}, {})
    x = torch.full((4096, 2), 3.0, dtype=torch.float16)
    for _ in range(20):
        moments.add("g", "layer", x.view(64, 64, 2))
    moments.mirror()
    total, tokens = moments.group("g")["layer"]
    assert (total.dtype, tokens) == (torch.float32, 20 * 4096)
    assert total.tolist() == [[9.0 * tokens] * 2] * 2  # beyond what float16 holds


# ---- Timestep groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 50])
@pytest.mark.parametrize("timesteps", [range(1, 1000, 20), [999, 759, 499, 259], [0, 999], [3.2, 500.7, 501.1, 17]])
def test_groups_hold_every_timestep_and_their_ranges_tile_the_training_timesteps(timesteps, count):
    groups = timestep_groups(timesteps, count)
    visited = sorted({round(timestep) for timestep in timesteps})
    assert len(groups) == min(count, len(visited))
    assert [timestep for group in groups for timestep in group["timesteps"]] == visited
    assert groups[0]["range"][0] == 0
    assert groups[-1]["range"][1] == 999
    for left, right in zip(groups, groups[1:], strict=False):
        assert left["range"][1] + 1 == right["range"][0]
        gap = right["timesteps"][0] - left["timesteps"][-1]
        assert abs(right["range"][0] - left["timesteps"][-1] - gap / 2) <= 0.5  # half way
    for group in groups:
        assert group["range"][0] <= group["timesteps"][0] <= group["timesteps"][-1] <= group["range"][1]
    sizes = [len(group["timesteps"]) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    expected = [JOINT] if count == 1 else ["timesteps-{:04d}-{:04d}".format(*group["range"]) for group in groups]
    assert [group["name"] for group in groups] == expected


def test_groups_of_another_schedule_end_at_its_last_timestep():
    assert [group["range"] for group in timestep_groups([10, 60], 2, num_train_timesteps=100)] == [[0, 34], [35, 99]]


# ---- Spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 96, 320])
def test_a_spectrum_reconstructs_its_second_moment(size):
    moment, spectrum = random_spectrum(size)
    assert spectrum.tokens == 1000
    assert (spectrum.eigenvalues.dtype, spectrum.eigenvectors.dtype) == (torch.float32, torch.float32)
    np.testing.assert_allclose(array(spectrum.eigenvalues), np.linalg.eigvalsh(moment)[::-1], rtol=1e-3, atol=1e-9)
    assert distance(spectrum.sum(), 1000 * moment) < 1e-3
    values, vectors = np.linalg.eigh(moment)
    restored = np.einsum("ij,ik,kj->j", vectors, array(spectrum.sum()) / 1000, vectors)
    kept = values >= 1e-5 * values[-1]
    assert 0 < kept.sum() < size
    np.testing.assert_allclose(restored[kept], values[kept], rtol=0.1)


def test_directions_that_no_input_has_are_free_and_without_drift():
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum.from_sum(x.T @ x, len(x))
    assert spectrum.eigenvalues.min() >= 0
    assert spectrum.rank("energy", 0.999999) == 5
    weight, unseen = torch.eye(24), torch.from_numpy(np.linalg.svd(array(x))[2][5:].copy())  # (19, in)
    assert predicted_drift(LoraLayer(unseen[:4], torch.ones(24, 4), 1.0), weight, spectrum) < 2e-3
    assert predicted_drift(LoraLayer(x[:4], torch.eye(24)[:, :4], 1.0), weight, spectrum) > 0.1


@pytest.mark.parametrize("size", [24, 96, 320])
def test_eigenvectors_are_orthonormal_and_span_what_was_stored(size):
    moment, spectrum = random_spectrum(size)
    vectors = spectrum.orthonormal()
    assert vectors.dtype == torch.float32
    assert np.abs(array(vectors).T @ array(vectors) - np.eye(size)).max() < 1e-6
    assert torch.equal(vectors, spectrum.eigenvectors)
    old = spectrum._replace(eigenvectors=spectrum.eigenvectors.half()).orthonormal()  # as format 1 stored them
    assert old.dtype == torch.float32
    assert np.abs(array(old).T @ array(old) - np.eye(size)).max() < 1e-6
    assert 1e-5 < np.linalg.norm(array(old) - array(vectors), 2) < 1e-3
    for rank in (1, size // 3, size - 1):
        inside = leading(moment, rank).T @ array(vectors)[:, :rank]
        assert np.linalg.svd(inside, compute_uv=False).min() > 1 - 1e-6  # cosines of the angles between the spans


def test_sums_that_are_not_finite_are_refused_by_name(world):
    total = torch.eye(4)
    total[1, 2] = math.nan
    for bad, tokens in ((total, 5), (total.nan_to_num(math.inf), 5), (torch.eye(4), 0)):
        with pytest.raises(NullSpaceError, match=r"mid\.attn1\.to_q.*NaN.*--mixed_precision"):
            Spectrum.from_sum(bad, tokens, name="mid.attn1.to_q")
    moments = copy.deepcopy(world.moments["all"].sums)
    broken = SecondMoments(world.unet, {}, {})
    broken.sums, broken.tokens = moments, world.moments["all"].tokens
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    broken.sums[world.groups[1]["name"], name][0, 0] = math.nan
    with pytest.raises(NullSpaceError, match=re.escape(name)):
        world.bundle(moments=broken)


# Eigenvalues that add up exactly, so that a threshold can be met exactly: the trace is 16.
STAIRS = Spectrum(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]), torch.eye(5).half(), 1)


@pytest.mark.parametrize(
    ("criterion", "threshold", "rank"),
    [
        ("energy", 0, 0),
        ("energy", 1e-9, 1),
        ("energy", 0.5, 1),
        ("energy", 0.501, 2),
        ("energy", 0.75, 2),
        ("energy", 0.9, 4),
        ("energy", 0.99, 5),
        ("eigenvalue", 2.0, 3),
        ("eigenvalue", 2.1, 2),
        ("eigenvalue", 0.5, 5),
        ("eigenvalue", 9, 0),
        ("percentile", 100, 0),
        ("percentile", 10, 5),
        ("percentile", 20, 4),
        ("percentile", 39, 4),
        ("percentile", 40, 3),
    ],
)
def test_ranks(criterion, threshold, rank):
    assert STAIRS.rank(criterion, threshold) == rank


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_energy_ranks_are_those_of_numpy(world, bundle, energy):
    for name, info in bundle.config["modules"].items():
        spectrum = bundle.group(JOINT)[info["input"]]
        assert is_energy_rank(spectrum.rank("energy", energy), world.moment(name), energy)
    assert STAIRS.rank() == STAIRS.rank("energy", 0.9)


@pytest.mark.parametrize(
    ("criterion", "threshold"),
    [
        ("energy", 1),
        ("energy", -0.1),
        ("energy", math.nan),
        ("eigenvalue", 0),
        ("eigenvalue", -1),
        ("eigenvalue", math.inf),
        ("percentile", 0),
        ("percentile", 100.5),
    ],
)
def test_thresholds_out_of_range_are_refused(criterion, threshold):
    with pytest.raises(NullSpaceError, match=f"--nullspace_threshold {threshold} .*'{criterion}'"):
        STAIRS.rank(criterion, threshold)


def test_an_unknown_criterion_is_refused():
    with pytest.raises(NullSpaceError, match="'variance'.*energy, eigenvalue, percentile"):
        STAIRS.rank("variance", 0.5)


def test_gains_are_the_root_of_the_soft_projector(world, bundle):
    """(lambda (C + lambda I)^-1)^(1/2), lambda being a share of the trace, by numpy from the inputs themselves."""
    for name, info in bundle.config["modules"].items():
        spectrum, moment = bundle.group(JOINT)[info["input"]], world.moment(name)
        for softness in (1e-4, 1e-2):
            vectors, gains = array(spectrum.orthonormal()), array(spectrum.gains(softness))
            assert (np.diff(gains) >= 0).all() and gains[0] < gains[-1] <= 1
            root = vectors * gains @ vectors.T
            scale = softness * np.trace(moment)
            assert distance(root @ root, scale * np.linalg.inv(moment + scale * np.eye(len(moment)))) < 2e-3
    assert (STAIRS.gains(math.inf) == 1).all()
    assert STAIRS.gains(8 / 16)[0].item() == pytest.approx(0.5**0.5)  # a direction with just this share of the energy


@pytest.mark.parametrize("softness", [0, -1, float("nan")])
def test_a_softness_out_of_range_is_refused(bundle, softness):
    with pytest.raises(NullSpaceError, match="--nullspace_softness .* must be above 0"):
        bundle.protected(softness=softness)


# ---- What a bundle protects ------------------------------------------------------------------------------------------


def test_a_bundle_protects_the_leading_directions_of_each_layer(any_world):
    bundle = any_world.bundle()
    protected = bundle.protected("energy", 0.99)
    assert set(protected) == set(attention_inputs(any_world.unet, "all"))
    for name, item in protected.items():
        moment = any_world.moment(name)
        assert is_energy_rank(item.rank, moment, 0.99)
        basis = array(item.basis)
        free = basis[:, item.rank :]
        assert free.shape[1] > 0
        assert np.trace(free.T @ moment @ free) <= 0.01 * np.trace(moment) * (1 + 1e-3)
    text = [item for name, item in protected.items() if TEXT_LAYER.search(name)]
    assert all(item is text[0] for item in text)


def test_directions_that_are_not_closed_are_held_back(bundle):
    by_default, hard = bundle.protected(), bundle.protected(softness=math.inf)
    assert all(item.gains is None for item in hard.values())
    for name, item in by_default.items():
        spectrum = bundle.group(JOINT)[bundle.modules[name]["input"]]
        assert item.rank == hard[name].rank == spectrum.rank("energy", 0.9)
        assert torch.equal(item.gains, spectrum.gains(1e-5)[item.rank :])
    assert all(item.rank == 0 and item.gains is None for item in bundle.protected(threshold=0).values())


@pytest.mark.parametrize("split", [False, True])
def test_emphasized_prompts_weigh_as_much_as_all_others(split, world, bundle, monkeypatch):
    """Whatever the number of their tokens: C is the mean of both C. The sums are decomposed, and nothing else."""
    groups = world.groups if split else bundle.config["groups"][:1]
    few = SecondMoments(world.unet, {}, {})
    for name in [TEXT_INPUT, *(group["name"] for group in groups)]:
        for source, item in bundle.spectra[name].items():
            few.tokens[name, source] = item.tokens // 10
            few.sums[name, source] = torch.diag(torch.arange(len(item.eigenvalues)) + 1.0) * few.tokens[name, source]
    decomposed, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: decomposed.append(matrix) or eigh(matrix))
    emphasized = bundle.emphasize(few, groups)
    changed = {TEXT_INPUT, JOINT, *(group["name"] for group in groups)}
    assert len(decomposed) == sum(len(bundle.spectra[name]) for name in changed)
    for name, spectra in bundle.spectra.items():
        for source, item in spectra.items():
            made = emphasized.spectra[name][source]
            if name in changed:
                own, other = item.sum() / item.tokens, torch.diag(torch.arange(len(item.eigenvalues)) + 1.0)
                assert distance(made.sum() / made.tokens, (own + other) / 2) < 1e-3 < 0.1 < distance(own, other)
                assert made.tokens == 2 * item.tokens
            else:
                assert made is item


def test_each_group_is_of_its_own_timesteps_and_joint_of_all(world, bundle):
    assert [group["name"] for group in bundle.config["groups"]] == [JOINT] + [group["name"] for group in world.groups]
    assert bundle.config["groups"][0]["timesteps"] == world.timesteps
    assert bundle.config["groups"][0]["range"] == [0, 999]
    for group in bundle.config["groups"]:
        for name, source in attention_inputs(world.unet, "all").items():
            spectrum = bundle.group(group["name"])[source]
            assert spectrum.tokens == len(world.inputs(name, group["timesteps"]))
            assert distance(spectrum.sum() / spectrum.tokens, world.moment(name, group["timesteps"])) < 1e-3
    alone = world.joint_bundle()
    assert [group["name"] for group in alone.config["groups"]] == [JOINT]
    for source, spectrum in alone.group(JOINT).items():
        assert distance(spectrum.sum(), bundle.group(JOINT)[source].sum()) < 1e-3
        assert spectrum.tokens == bundle.group(JOINT)[source].tokens


@pytest.mark.parametrize(
    ("criterion", "threshold", "advice"),
    [("eigenvalue", 1.0, "higher"), ("percentile", 10, "higher"), ("energy", 0.99, "lower")],
)
def test_a_layer_without_a_free_direction_is_refused_by_name(criterion, threshold, advice):
    roomy = Spectrum(torch.tensor([8.0] + [0.01] * 9), torch.eye(10).half(), 1)
    full = Spectrum(torch.ones(5), torch.eye(5).half(), 1)
    modules = {"roomy.to_q": {"input": "roomy.to_q"}, "full.to_q": {"input": "full.to_q"}}
    bundle = Bundle({"modules": modules}, {JOINT: {"roomy.to_q": roomy, "full.to_q": roomy}})
    assert 0 < bundle.protected(criterion, threshold)["full.to_q"].rank < 10
    bundle.spectra[JOINT]["full.to_q"] = full
    pattern = f"--nullspace_criterion {criterion} --nullspace_threshold {threshold} .*full\\.to_q .*choose a {advice} "
    with pytest.raises(NullSpaceError, match=pattern):
        bundle.protected(criterion, threshold)


# ---- The projector ---------------------------------------------------------------------------------------------------


EXACT, HALF = 1e-4, 0.1  # lowest gains that are held back in float32 and in half precision


def mixture(adapter="default", rank=3, seed=0, lowest=None):
    """Modules with A (rank, in) alone, as LoRA layers hold it, and bases of all kinds for them, own and shared."""
    small, large = {"small": (24, 5), "smaller": (24, 2), "half": (24, 12)}, {"large": (24, 20), "larger": (24, 13)}
    own = {**small, **large, "none": (24, 0)}
    shared = {"small_shared": (16, 3), "large_shared": (16, 15), "none_shared": (16, 0), "triple": (24, 7)}
    protected = {}
    for index, (kind, (size, k)) in enumerate((own | shared).items()):
        gains = torch.linspace(lowest, 1, size - k) if lowest and k else None
        item = Protected(torch.from_numpy(random_basis(size, seed + index)).float(), k, gains)
        for copy_index in range(1 if kind in own else 3 if kind == "triple" else 2):
            protected[f"{kind}_{copy_index}"] = item
    order = np.random.default_rng(seed).permutation(len(protected))  # modules that share need not be neighbours
    protected = {name: protected[name] for name in np.array(list(protected))[order].tolist()}
    torch.manual_seed(seed)
    unet = torch.nn.Module()
    for name, item in protected.items():
        layer = torch.nn.Module()
        layer.lora_A = torch.nn.ModuleDict({adapter: torch.nn.Linear(len(item.basis), rank, bias=False)})
        unet.add_module(name, layer)
    return unet, protected


def projected(x, item):
    """x (r, in) without what lies in the protected directions, the rest times its gains, (r, in) float64."""
    free = array(item.basis)[:, item.rank :]
    return array(x) @ free * (1 if item.gains is None else array(item.gains)) @ free.T


def worst_share(projector, protected):
    """The largest share of any A's norm that lies in what is protected."""
    shares = [0.0]
    for name, item in protected.items():
        a = array(projector.parameters[name])
        shares.append(np.linalg.norm(a @ array(item.basis)[:, : item.rank]) / np.linalg.norm(a))
    return max(shares)


def down(unet, adapter="default"):
    return {name: layer.lora_A[adapter].weight for name, layer in unet.named_children()}


def set_gradients(unet, seed):
    torch.manual_seed(seed)
    for parameter in unet.parameters():
        parameter.grad = torch.randn_like(parameter)


def project_by_numpy(unet, protected):
    """Replace each gradient by what a projector makes of it."""
    for name, parameter in down(unet).items():
        parameter.grad.copy_(torch.from_numpy(projected(parameter.grad, protected[name])))


def assert_close(found, expected, lowest=None):
    np.testing.assert_allclose(array(found), expected, atol=1e-3 if lowest == HALF else 2e-6, rtol=0)


@pytest.mark.parametrize("lowest", [None, EXACT, HALF])
@pytest.mark.parametrize(("adapter", "seed"), [("default", 0), ("default", 1), ("default", 2), ("subject", 3)])
def test_initial_values_are_projected(adapter, seed, lowest):
    unet, protected = mixture(adapter, seed=seed, lowest=lowest)
    before = {name: parameter.clone() for name, parameter in down(unet, adapter).items()}
    projector = NullSpaceProjector(unet, protected, adapter)
    for name, parameter in down(unet, adapter).items():
        assert_close(parameter, projected(before[name], protected[name]), lowest)
        assert torch.equal(parameter, before[name]) == (protected[name].rank == 0)
        assert parameter.requires_grad
        assert parameter.is_leaf
    assert worst_share(projector, protected) < 1e-6


@pytest.mark.parametrize("lowest", [None, EXACT, HALF])
def test_gradients_are_projected(lowest):
    unet, protected = mixture(lowest=lowest)
    projector = NullSpaceProjector(unet, protected)
    set_gradients(unet, 1)
    before = {name: (parameter.clone(), parameter.grad.clone()) for name, parameter in down(unet).items()}
    projector.project_gradients()
    for name, parameter in down(unet).items():
        assert torch.equal(parameter, before[name][0])
        assert_close(parameter.grad, projected(before[name][1], protected[name]), lowest)


def test_a_layer_without_a_gradient_keeps_no_other_from_its_projection():
    unet, protected = mixture()
    projector = NullSpaceProjector(unet, protected)
    for absent in down(unet):
        set_gradients(unet, 1)
        down(unet)[absent].grad = None
        before = {name: parameter.grad for name, parameter in down(unet).items()}
        before = {name: None if gradient is None else gradient.clone() for name, gradient in before.items()}
        projector.project_gradients()
        for name, parameter in down(unet).items():
            if name == absent:
                assert parameter.grad is None
            else:
                assert_close(parameter.grad, projected(before[name], protected[name]))


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-2),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_values_are_projected_after_each_step(make_optimizer):
    unet, protected = mixture()
    twin = copy.deepcopy(unet)  # takes the same steps, and is then projected by numpy
    projector = NullSpaceProjector(unet, protected)
    optimizer, twin_optimizer = make_optimizer(unet.parameters()), make_optimizer(twin.parameters())
    projector.attach(optimizer)
    left = 0.0
    for step in range(5):
        twin.load_state_dict(unet.state_dict())
        set_gradients(unet, step)
        set_gradients(twin, step)
        project_by_numpy(twin, protected)
        optimizer.step()
        twin_optimizer.step()
        for name, parameter in down(unet).items():
            expected = projected(down(twin)[name], protected[name])
            assert_close(parameter, expected)
            left = max(left, np.abs(expected - array(down(twin)[name])).max())
    scales_coordinates = not isinstance(optimizer, torch.optim.SGD)
    assert (left > 1e-2) == scales_coordinates  # without projection it would have left, though its gradients had not
    assert worst_share(projector, protected) < 1e-6


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_changes_are_held_back_after_each_step(make_optimizer):
    """A step moves A by the optimizer's change times the gains, and what is closed stays closed over many steps."""
    unet, protected = mixture(lowest=EXACT)
    twin = copy.deepcopy(unet)
    projector = NullSpaceProjector(unet, protected)
    optimizer, twin_optimizer = make_optimizer(unet.parameters()), make_optimizer(twin.parameters())
    projector.attach(optimizer)
    for step in range(50):
        before = {name: parameter.detach().clone() for name, parameter in down(unet).items()}
        twin.load_state_dict(unet.state_dict())
        set_gradients(unet, step)
        set_gradients(twin, step)
        project_by_numpy(twin, protected)
        optimizer.step()
        twin_optimizer.step()
        for name, parameter in down(unet).items():
            change = down(twin)[name].detach() - before[name]
            assert_close(parameter, array(before[name]) + projected(change, protected[name]))
    assert worst_share(projector, protected) < 1e-6


def test_holding_back_is_the_optimizers_step_in_other_coordinates():
    """It is gradient descent on A S^-1, S having the gains as eigenvalues."""
    size, rank = 12, 3
    closed = Protected(torch.from_numpy(random_basis(size, 0)).float(), 1, torch.linspace(EXACT, 1, size - 1))
    target = torch.randn(rank, size, dtype=torch.float64)
    unet = torch.nn.Module()
    unet.layer = torch.nn.Module()
    unet.layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(size, rank, bias=False)})
    parameter = unet.layer.lora_A["default"].weight
    raw = array(parameter)
    projector = NullSpaceProjector(unet, {"layer": closed})
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    projector.attach(optimizer)
    basis = array(closed.basis)[:, 1:]
    gains = array(closed.gains)
    coordinates = raw @ basis  # of A = coordinates * gains @ basis^T
    for _ in range(20):
        loss = (parameter.double() - target).square().sum() / 2
        loss.backward()
        projector.project_gradients()
        optimizer.step()
        optimizer.zero_grad()
        coordinates = coordinates - 0.1 * (coordinates * gains @ basis.T - array(target)) @ basis * gains
        assert_close(parameter, coordinates * gains @ basis.T)


def allows_tf32():
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


class TensorFloat32(TorchDispatchMode):
    """Rounds what float32 matrix products read to TF32, as a GPU does where it is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm") and allows_tf32():
            args = [*args[:-2], *map(self.round, args[-2:])]  # what is added to is not rounded
        return func(*args, **(kwargs or {}))

    def round(self, x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    with TensorFloat32():
        yield
    torch.backends.cuda.matmul.allow_tf32 = False


def test_tf32_does_not_leak(tf32):
    unet, protected = mixture()
    x = torch.randn(8, 8)
    assert 1e-5 < distance(x @ x, array(x) @ array(x)) < 1e-2
    set_gradients(unet, 0)
    before = {name: (parameter.clone(), parameter.grad.clone()) for name, parameter in down(unet).items()}
    NullSpaceProjector(unet, protected).project_gradients()
    for name, parameter in down(unet).items():
        assert_close(parameter, projected(before[name][0], protected[name]))
        assert_close(parameter.grad, projected(before[name][1], protected[name]))
    assert torch.backends.cuda.matmul.allow_tf32  # as the user chose


@pytest.mark.parametrize("allowed", [False, True])
def test_moments_use_tf32_only_where_it_loses_nothing(allowed, tf32):
    """Against sums in float64, with TF32 emulated."""
    used, rounds = [], TensorFloat32.round
    torch.backends.cuda.matmul.allow_tf32 = allowed
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(100, 8).to(dtype)
        moments = SecondMoments(None, {}, {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TensorFloat32, "round", lambda self, x, dtype=dtype: (used.append(dtype), rounds(self, x))[1])
            moments.add(JOINT, "x", x)
            moments.mirror()
        assert distance(moments.sums[JOINT, "x"], array(x).T @ array(x)) < 1e-6
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
    assert set(used) == {torch.float16, torch.bfloat16}


@pytest.mark.parametrize("lowest", [None, EXACT])
def test_two_optimizers_can_share_a_projector(lowest):
    unet, protected = mixture(lowest=lowest)
    twin = copy.deepcopy(unet)
    projector = NullSpaceProjector(unet, protected)
    twin.load_state_dict(unet.state_dict())
    for factory, start in ((OPTIMIZERS["adamw"], 0), (OPTIMIZERS["sgd"], 1)):
        optimizer = factory(list(unet.parameters())[start::2])
        twin_optimizer = factory(list(twin.parameters())[start::2])
        projector.attach(optimizer)
        before = {name: array(parameter) for name, parameter in down(unet).items()}
        set_gradients(unet, start)
        set_gradients(twin, start)
        project_by_numpy(twin, protected)
        optimizer.step()
        twin_optimizer.step()
        for name, parameter in down(unet).items():
            change = down(twin)[name].detach() - torch.from_numpy(before[name]).float()
            assert_close(parameter, before[name] + projected(change, protected[name]))
        twin.load_state_dict(unet.state_dict())


# ---- The guarantee ---------------------------------------------------------------------------------------------------


def train(world, protected, after_steps, steps=500):
    """Teach the tiny UNet's LoRA to answer one prompt with one picture; with the projection after each step or not."""
    unet = world.unet_with_lora()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    projector = NullSpaceProjector(unet, protected)
    if after_steps:
        projector.attach(optimizer)
    text = world.pipeline.encode_prompt("a photo of sks star", "cpu", 1, False)[0].detach()
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 4, 8, 8, generator=generator)
    for _ in range(steps):
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        timestep = torch.randint(1000, (1,), generator=generator)
        loss = (unet(latents, timestep, text).sample - target).square().mean()
        loss.backward()
        projector.project_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return unet


def worst_leakage(world, layers, protected):
    """The largest ||dW U_k|| / ||dW|| of any layer, in float64 numpy, dW as a whole matrix."""
    assert set(layers) == set(protected)
    shares = []
    for name, layer in layers.items():
        delta = layer.scale * array(layer.up) @ array(layer.down)
        assert np.linalg.norm(delta) > 5e-3 * np.linalg.norm(array(world.unet.get_submodule(name).weight))  # it learned
        inside = delta @ array(protected[name].basis)[:, : protected[name].rank]
        shares.append(np.linalg.norm(inside) / np.linalg.norm(delta))
        expected = shares[-1] + protected[name].distance
        assert leakage(layer, protected[name]) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    return max(shares)


def test_the_guarantee(world, bundle, tmp_path):
    protected = bundle.protected("energy", 0.99)
    assert all(0 < item.rank < len(item.basis) for item in protected.values())
    unet = train(world, protected, after_steps=True)
    worst = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        save_lora(folder, unet, dtype)
        assert load_file(folder / LORA_NAME).popitem()[1].dtype == dtype
        worst[dtype] = worst_leakage(world, load_lora(folder), protected)
    assert worst[torch.float32] <= 1e-5
    assert worst[torch.bfloat16] <= 2e-3
    assert worst[torch.float16] <= 2e-3

    save_lora(tmp_path / "without", train(world, protected, after_steps=False, steps=100))
    without = worst_leakage(world, load_lora(tmp_path / "without"), protected)
    assert without >= 100 * max(worst[torch.float32], 1e-5)  # after a fifth of the steps


# ---- The audit of a saved LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "scale"), [(0, 1.0), (1, 0.5), (9, 1.0), (23, 2.0)])
@pytest.mark.parametrize("lora_rank", [1, 4, 16])
def test_leakage_is_the_share_of_the_update_in_the_protected_directions(rank, scale, lora_rank):
    torch.manual_seed(0)
    layer = LoraLayer(torch.randn(lora_rank, 24).half(), torch.randn(12, lora_rank).half(), scale)
    protected = Protected(torch.from_numpy(random_basis(24, 1)).float(), rank)
    delta = scale * array(layer.up) @ array(layer.down)
    expected = np.linalg.norm(delta @ array(protected.basis)[:, :rank]) / np.linalg.norm(delta)
    assert leakage(layer, protected) == pytest.approx(expected, rel=1e-6)
    assert leakage(layer._replace(up=torch.zeros(12, lora_rank)), protected) == 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_predicted_drift_is_that_of_numpy(scale):
    moment, spectrum = random_spectrum(24, decades=4)
    torch.manual_seed(0)
    layer = LoraLayer(torch.randn(4, 24), torch.randn(12, 4), scale)
    weight = torch.randn(12, 24)
    delta = scale * array(layer.up) @ array(layer.down)
    expected = np.sqrt(np.trace(delta @ moment @ delta.T) / np.trace(array(weight) @ moment @ array(weight).T))
    assert predicted_drift(layer, weight, spectrum) == pytest.approx(expected, rel=1e-3)


def test_predicted_drift_is_the_drift_over_the_inputs_that_were_collected(any_world):
    unet, bundle = any_world.unet_with_lora(up=0.1), any_world.bundle()
    for name, info in bundle.config["modules"].items():
        lora = unet.get_submodule(name)
        layer = LoraLayer(lora.lora_A["default"].weight, lora.lora_B["default"].weight, 1.0)
        layer = layer._replace(down=layer.down.detach(), up=layer.up.detach())
        x = torch.from_numpy(any_world.inputs(name)).float()
        with torch.no_grad():
            answers = torch.nn.functional.linear(x, lora.base_layer.weight)
            changes = lora.lora_B["default"](lora.lora_A["default"](x))
        expected = np.linalg.norm(array(changes)) / np.linalg.norm(array(answers))
        found = predicted_drift(layer, lora.base_layer.weight, bundle.group(JOINT)[info["input"]])
        assert found == pytest.approx(expected, rel=1e-3)


def test_the_audit_lists_every_layer_and_sums_up_those_that_are_covered(world):
    bundle = world.bundle("cross")
    lora = world.unet_with_lora(up=0.1)
    layers = {}
    for name in attention_inputs(lora, "all"):
        module = lora.get_submodule(name)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        layers[name] = LoraLayer(a.detach(), b.detach(), 1.0)
    found = audit(layers, bundle, world.unet, 0.9)
    protected = bundle.protected("energy", 0.9)
    assert [row["module"] for row in found["layers"]] == list(layers)
    covered = [row for row in found["layers"] if LAYERS["cross"].search(row["module"])]
    assert 0 < len(covered) < len(layers)
    for row in found["layers"]:
        name = row["module"]
        assert row["in_features"] == layers[name].down.shape[1]
        if row in covered:
            spectrum = bundle.group(JOINT)[bundle.config["modules"][name]["input"]]
            assert row["protected_rank"] == protected[name].rank > 0
            assert row["leakage"] == leakage(layers[name], protected[name]) > 0
            weight = world.unet.get_submodule(name).weight
            assert row["predicted_drift"] == predicted_drift(layers[name], weight, spectrum) > 0
        else:
            assert (row["protected_rank"], row["leakage"], row["predicted_drift"]) == (0, None, None)
    for key in ("leakage", "predicted_drift"):
        values = [row[key] for row in covered]
        assert found[key]["max"] == max(values)
        assert found[key]["mean"] == pytest.approx(np.mean(values))
        assert found[key]["rms"] == pytest.approx(np.sqrt(np.mean(np.square(values))))
    assert audit(layers, bundle, lora, 0.9) == found  # the LoRA's own UNet does as well

    nothing = audit(layers, bundle, world.unet, 0)
    assert nothing["leakage"] == {"max": None, "mean": None, "rms": None}
    assert nothing["predicted_drift"] == found["predicted_drift"]
    others = {name: layer for name, layer in layers.items() if LAYERS["self"].search(name)}
    assert audit(others, bundle, world.unet)["predicted_drift"] == {"max": None, "mean": None, "rms": None}


@pytest.mark.parametrize(("drift", "word"), [(0.01, "little"), (0.4, "noticeably"), (2.0, "strongly")])
def test_the_verdict_says_how_much_and_of_how_many_layers(drift, word):
    layers, found = [{"predicted_drift": drift}, {"predicted_drift": None}], {"leakage": {"max": 0.5}}
    text = verdict({**found, "predicted_drift": {"rms": drift}, "layers": layers})
    assert (
        f"{word} (by {drift:.2g}, RMS; noticeably from 0.3, strongly from 0.6); up to 0.5 of a layer's change" in text
    )
    assert text.endswith("reaches what it closes; 1 of its 2 layers are not covered and not counted.")
    found["leakage"]["max"] = None  # nothing is closed
    text = verdict({**found, "predicted_drift": {"rms": drift}, "layers": layers[:1]})
    assert "not covered" not in text and "closes" not in text
    assert "nothing can be said" in verdict({**found, "predicted_drift": {"rms": None}, "layers": layers[1:]})


@pytest.fixture
def audited(tiny_sd1, tmp_path):
    """Command line of an audit of a LoRA on the text encoder and on all attention, its bundle for cross-attention."""
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "with text encoder"
    prompts.write_text("a red star\n")
    words = ["--pretrained_model_name_or_path", str(tiny_sd1), "--prompts_file", str(prompts), "--with_text_encoder"]
    words += ["--num_inference_steps", "1", "--output_dir", str(folder)]
    build_nullspace.main(build_nullspace.parse_args(words))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    targets = {"unet": ["attn1.to_q", "attn2.to_k"], "text_encoder": ["q_proj"]}
    layers = {}
    for name, modules in targets.items():
        model = getattr(pipeline, name)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=modules, init_lora_weights=False), model)
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **layers)
    return ["audit", "--lora", str(tmp_path / "lora"), "--nullspace", str(folder)]


def test_the_audit_on_the_command_line(audited, capsys):
    """A row for each layer with the figures of `audit`, and the verdict, on the model that the bundle names."""
    nullspace_utils.main(nullspace_utils.parse_args(audited))
    *rows, last = capsys.readouterr().out.splitlines()[1:]
    bundle = Bundle.load(audited[-1], text_encoder=True)
    models = nullspace_utils.load_audited_models(bundle, with_text_encoder=True)
    found = audit(load_lora(audited[2]), bundle, **models)
    assert len(rows) == len(found["layers"]) == 7 + 7 + 2
    for line, row in zip(rows, found["layers"], strict=True):
        values = ["-" if row[key] is None else f"{row[key]:.2e}" for key in ("leakage", "predicted_drift")]
        assert line.split() == [row["module"], str(row["in_features"]), str(row["protected_rank"]), *values]
        assert (row["leakage"] is None) == ("attn1" in row["module"])
    assert last == verdict(found)

    nullspace_utils.main(nullspace_utils.parse_args([*audited, "--nullspace_threshold", "0.5"]))
    fewer = [int(line.split()[2]) for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert sum(fewer) < sum(row["protected_rank"] for row in found["layers"])


def test_an_audit_that_cannot_be_is_refused(audited, tiny_sd2, tmp_path):
    def refusal(*flags):
        with pytest.raises(NullSpaceError) as error:
            nullspace_utils.main(nullspace_utils.parse_args([*audited, *map(str, flags)]))
        return str(error.value)

    assert "cannot be read as a LoRA" in refusal("--lora", tmp_path)
    assert f"The base model {tmp_path} cannot be loaded" in refusal("--pretrained_model_name_or_path", tmp_path)
    assert "here it is" in refusal("--pretrained_model_name_or_path", tiny_sd2)


def fused_change(world, folder):
    """What diffusers adds to each attention weight when it loads and fuses a LoRA: `dict[str, ndarray]`."""
    parts = {**world.pipeline.components, "unet": copy.deepcopy(world.unet)}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    weights = {name: array(world.unet.get_submodule(name).weight) for name in attention_inputs(world.unet, "all")}
    return {name: array(pipeline.unet.get_submodule(name).weight) - weight for name, weight in weights.items()}


def assert_read_as_diffusers_does(world, folder):
    layers = load_lora(folder)
    changes = {name: change for name, change in fused_change(world, folder).items() if np.abs(change).max() > 0}
    assert set(layers) == set(changes)
    for name, layer in layers.items():
        assert distance(layer.scale * array(layer.up) @ array(layer.down), changes[name]) < 1e-4


@pytest.mark.parametrize("lora_alpha", [4, 2, 32])
def test_a_lora_is_scaled_as_diffusers_does_with_metadata(world, tmp_path, lora_alpha):
    unet = world.unet_with_lora(rank=4, up=0.5, lora_alpha=lora_alpha)
    save_lora(tmp_path, unet, **_collate_lora_metadata({"unet": unet}))
    assert_read_as_diffusers_does(world, tmp_path)


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize(
    "config",
    [{"rank_pattern": {"to_q": 2}}, {"alpha_pattern": {"to_q": 1, "to_out.0": 16}}, {"use_rslora": True}],
    ids=lambda config: next(iter(config)),
)
def test_a_lora_with_layers_of_their_own_ranks_and_scales(world, tmp_path, config, metadata):
    unet = world.unet_with_lora(rank=4, up=0.5, **config)
    save_lora(tmp_path, unet, **(_collate_lora_metadata({"unet": unet}) if metadata else {}))
    assert_read_as_diffusers_does(world, tmp_path)


@pytest.mark.parametrize("alpha", [4.0, 1.0])
def test_a_lora_in_the_kohya_format(world, tmp_path, alpha):
    tensors = {}
    for name in attention_inputs(world.unet, "cross"):
        key = f"lora_unet_{name.replace('.', '_')}"
        torch.manual_seed(len(tensors))
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, world.unet.get_submodule(name).in_features)
        tensors[f"{key}.lora_up.weight"] = torch.randn(world.unet.get_submodule(name).out_features, 4)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / LORA_NAME)
    assert_read_as_diffusers_does(world, tmp_path)


def test_a_lora_can_be_given_as_a_file(world, tmp_path):
    save_lora(tmp_path, world.unet_with_lora(up=0.5))
    assert load_lora(tmp_path / LORA_NAME).keys() == load_lora(str(tmp_path)).keys() == load_lora(tmp_path).keys()


def test_files_without_a_lora_of_the_unet_are_refused(world, tmp_path):
    save_lora(tmp_path / "lora", world.unet_with_lora())
    path = tmp_path / "lora" / LORA_NAME
    text = {key.replace("unet.", "text_encoder."): value for key, value in load_file(path).items()}
    save_file(text, path)
    with pytest.raises(NullSpaceError, match="no LoRA layer of a UNet"):
        load_lora(tmp_path / "lora")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(NullSpaceError, match="cannot be read as a LoRA"):
        load_lora(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "mistyped", "runs/mistyped/lora"):
        with pytest.raises(NullSpaceError, match="cannot be read as a LoRA"):
            load_lora(folder)


# ---- Adding and restricting ------------------------------------------------------------------------------------------


def test_merging_two_halves_gives_the_bundle_of_all(world, bundle):
    first, second = (world.bundle(moments=moments) for moments in world.halves)
    second.config["prompts"] = {"source": "more", "count": 3, "sha256": "1" * 64, "examples": ["a moon"]}
    configs = copy.deepcopy((first.config, second.config))
    merged = first.merge(second)
    assert (first.config, second.config) == configs
    assert set(merged.spectra) == set(bundle.spectra)
    for name, spectra in merged.spectra.items():
        assert set(spectra) == set(bundle.spectra[name])
        for source, spectrum in spectra.items():
            assert spectrum.tokens == bundle.spectra[name][source].tokens
            assert distance(spectrum.sum(), bundle.spectra[name][source].sum()) < 2e-3
    for name, source in attention_inputs(world.unet, "all").items():
        spectrum = merged.group(JOINT)[source]
        assert distance(spectrum.sum() / spectrum.tokens, world.moment(name)) < 1e-3
    prompts = merged.config["prompts"]
    assert (prompts["source"], prompts["count"], prompts["examples"]) == ("test + more", 5, ["a star", "a moon"])
    assert prompts["sha256"] not in ("0" * 64, "1" * 64)
    merged.check(world.unet)


def test_only_bundles_of_the_same_model_and_groups_are_merged(world, bundle):
    other = copy.deepcopy(bundle)
    other.config["base_model"]["fingerprint"] = {"unet": "f" * 64}
    with pytest.raises(NullSpaceError, match="cannot be merged: their base model differ"):
        bundle.merge(other)
    other.config["base_model"]["fingerprint"] = "f" * 64
    with pytest.raises(NullSpaceError, match="cannot be merged: one is of the old format"):
        bundle.merge(other)
    other = copy.deepcopy(bundle)
    other.config["base_model"]["id"] = "another/name"  # of the same weights
    bundle.merge(other)
    with pytest.raises(NullSpaceError, match="cannot be merged: their groups differ"):
        bundle.merge(world.joint_bundle())
    with pytest.raises(NullSpaceError, match="cannot be merged: their "):
        bundle.merge(world.bundle("cross"))


def test_bundles_that_were_loaded_in_part_are_not_merged(bundle, saved):
    with_text_encoder = copy.deepcopy(bundle)
    with_text_encoder.config["text_encoder"] = {"modules": {}, "fingerprint": "f" * 64}
    in_part = (bundle, Bundle.load(saved)), (Bundle.load(saved), bundle), (with_text_encoder, with_text_encoder)
    for first, second in in_part:
        with pytest.raises(NullSpaceError, match="cannot be merged"):
            first.merge(second)


def test_restricting_keeps_the_second_moments_of_those_timesteps(world, bundle):
    kept = world.groups[1:]
    first, last = kept[0]["timesteps"][0], kept[-1]["timesteps"][-1]
    before = copy.deepcopy(bundle.config)
    restricted = bundle.restrict(first, last)
    assert bundle.config == before
    timesteps = [timestep for group in kept for timestep in group["timesteps"]]
    assert 0 < len(timesteps) < len(world.timesteps)
    assert restricted.config["groups"][0]["timesteps"] == timesteps
    assert restricted.config["groups"][0]["range"] == [kept[0]["range"][0], 999]
    assert restricted.config["groups"][1:] == kept
    assert set(restricted.spectra) == {JOINT, TEXT_INPUT, *(group["name"] for group in kept)}
    for name, source in attention_inputs(world.unet, "all").items():
        spectrum = restricted.group(JOINT)[source]
        assert spectrum.tokens == len(world.inputs(name, timesteps))
        assert distance(spectrum.sum() / spectrum.tokens, world.moment(name, timesteps)) < 1e-3


def test_restricting_to_one_group_or_to_all_of_them(world, bundle, tmp_path):
    alone = bundle.restrict(*world.groups[0]["range"])
    assert [group["name"] for group in alone.config["groups"]] == [JOINT, world.groups[0]["name"]]
    for source, spectrum in alone.group(JOINT).items():
        assert distance(spectrum.sum(), bundle.group(world.groups[0]["name"])[source].sum()) < 1e-3
    alone.save(tmp_path / "alone")
    assert_same(Bundle.load(tmp_path / "alone"), alone, {JOINT, TEXT_INPUT})
    whole = bundle.restrict(0, 999)
    assert whole.config["groups"] == bundle.config["groups"]
    for source, spectrum in whole.group(JOINT).items():
        assert torch.equal(spectrum.eigenvectors, bundle.group(JOINT)[source].eigenvectors)


def test_a_range_that_cuts_a_group_or_holds_none_is_refused(world, bundle, saved):
    cut = world.groups[1]["timesteps"]
    between = [cut[0] + 1, cut[1] - 1]
    for restrict in (bundle.restrict, lambda first, last: Bundle.load(saved, timestep_range=(first, last))):
        with pytest.raises(NullSpaceError, match=f"{cut[0]} to {cut[-1]}.*--timestep_groups steps"):
            restrict(0, cut[0])
        with pytest.raises(NullSpaceError, match=f"{cut[0]} to {cut[-1]}.*--timestep_groups steps"):
            restrict(cut[-1], 999)
        with pytest.raises(NullSpaceError, match=f"between {between[0]} and {between[1]}"):
            restrict(*between)
        with pytest.raises(NullSpaceError, match="between 900 and 100"):
            restrict(900, 100)
    restricted = bundle.restrict(cut[0], cut[-1])  # both ends are included
    assert restricted.config["groups"][0]["timesteps"] == cut


# ---- Writing and reading ---------------------------------------------------------------------------------------------


def assert_same(first, second, names=None):
    names = set(second.spectra) if names is None else names
    assert set(first.spectra) == names
    for name in names:
        assert set(first.spectra[name]) == set(second.spectra[name])
        for source, spectrum in first.spectra[name].items():
            other = second.spectra[name][source]
            assert spectrum.tokens == other.tokens
            parts, others = dict(spectrum.parts()), dict(other.parts())
            assert parts.keys() == others.keys()
            assert all(torch.equal(parts[key], others[key]) for key in parts)


def test_a_bundle_comes_back_as_it_was_saved(world, bundle, saved):
    loaded = Bundle.load(saved, every_group=True)
    assert_same(loaded, bundle)
    assert loaded.config == bundle.config == json.loads((saved / "nullspace_config.json").read_text())
    loaded.check(world.unet)
    groups = {f"{name}.safetensors" for name in (TEXT_INPUT, JOINT, *(group["name"] for group in world.groups))}
    assert {path.name for path in saved.iterdir()} == groups | {"nullspace_config.json", "modules.csv"}
    assert set(loaded.config["files"]) == groups | {"modules.csv"}
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]

    loaded.save(saved.with_name("again"))
    assert_same(Bundle.load(str(saved.with_name("again")), every_group=True), bundle)


def test_the_table_counts_the_ranks_of_every_module_and_group(world, bundle, saved):
    lines = (saved / "modules.csv").read_text().splitlines()
    columns = lines[0].split(",")
    assert columns[:6] == ["module", "group", "input", "in_features", "out_features", "tokens"]
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    inputs = attention_inputs(world.unet, "all")
    per_group = [name for name, source in inputs.items() if source != TEXT_INPUT]
    expected = {(name, group["name"]) for name in per_group for group in bundle.config["groups"]}
    expected |= {(name, TEXT_INPUT) for name, source in inputs.items() if source == TEXT_INPUT}
    assert {(row["module"], row["group"]) for row in rows} == expected
    assert len(rows) == len(expected)
    timesteps = {group["name"]: group["timesteps"] for group in bundle.config["groups"]}
    for row in rows:
        name, weight = row["module"], world.unet.get_submodule(row["module"]).weight
        assert row["input"] == inputs[name]
        assert (int(row["out_features"]), int(row["in_features"])) == tuple(weight.shape)
        assert int(row["tokens"]) == len(world.inputs(name, timesteps.get(row["group"])))
        moment = world.moment(name, timesteps.get(row["group"]))
        for energy in (0.9, 0.99, 0.999, 0.9999):
            assert is_energy_rank(int(row[f"rank_{energy}"]), moment, energy)


def test_only_the_files_that_are_needed_are_read(world, bundle, saved):
    names = [group["name"] for group in world.groups]
    text_only = {JOINT, TEXT_INPUT}
    kept = saved.with_name("kept")
    shutil.copytree(saved, kept)
    for name in names:
        (saved / f"{name}.safetensors").unlink()
    assert_same(Bundle.load(saved), bundle, text_only)
    with pytest.raises(NullSpaceError, match=rf"{names[0]}\.safetensors.*not a whole one"):
        Bundle.load(saved, every_group=True)
    with pytest.raises(NullSpaceError, match=rf"{names[2]}\.safetensors.*not a whole one"):
        Bundle.load(saved, timestep_range=world.groups[2]["range"])

    (kept / "joint.safetensors").unlink()
    (kept / f"{names[0]}.safetensors").unlink()
    expected = bundle.restrict(world.groups[1]["range"][0], 999)
    for every_group in (False, True):
        part = Bundle.load(kept, (world.groups[1]["range"][0], 999), every_group=every_group)
        assert_same(part, expected)
        assert part.config["groups"] == expected.config["groups"]
    with pytest.raises(NullSpaceError, match=r"joint\.safetensors"):
        Bundle.load(kept)


def test_a_bundle_in_one_group_has_no_others(world, tmp_path):
    alone = world.joint_bundle()
    alone.save(tmp_path / "joint")
    assert_same(Bundle.load(tmp_path / "joint"), alone)
    assert_same(Bundle.load(tmp_path / "joint", timestep_range=(0, 999)), alone)
    assert_same(Bundle.load(tmp_path / "joint", every_group=True), alone)


def test_a_bundle_of_self_attention_needs_no_text(world, tmp_path):
    world.bundle("self").save(tmp_path / "self")
    assert not (tmp_path / "self" / f"{TEXT_INPUT}.safetensors").exists()
    loaded = Bundle.load(tmp_path / "self")
    assert set(loaded.protected()) == set(attention_inputs(world.unet, "self"))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty])
@pytest.mark.parametrize("name", [JOINT, TEXT_INPUT])
def test_a_damaged_file_is_refused(saved, damage, name):
    damage(saved / f"{name}.safetensors")
    with pytest.raises(NullSpaceError, match=rf"{name}\.safetensors is truncated or altered.* again\.$"):
        Bundle.load(saved)


def test_a_missing_file_is_named(saved):
    (saved / f"{TEXT_INPUT}.safetensors").unlink()
    with pytest.raises(NullSpaceError, match=rf"{saved} has no {TEXT_INPUT}\.safetensors.*\.$"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    "content",
    ["{", "", "[]", "null", "{}", '{"format_version": null}', '{"format_version": "1"}', '{"format_version": 1}'],
)
def test_a_configuration_that_is_none_is_refused(saved, content):
    (saved / "nullspace_config.json").write_text(content)
    with pytest.raises(NullSpaceError, match=r"nullspace_config\.json is not a bundle's configuration.* again\.$"):
        Bundle.load(saved)


def test_an_altered_configuration_is_refused(saved):
    path = saved / "nullspace_config.json"
    config = json.loads(path.read_text())
    config["groups"][0]["range"][1] -= 1
    path.write_text(json.dumps(config))
    with pytest.raises(NullSpaceError, match=r"nullspace_config\.json is altered .* again\.$"):
        Bundle.load(saved)


def test_every_file_of_a_bundle_but_its_card_is_checked(bundle, saved):
    bundle.save(saved, extras=[lambda bundle, folder: (folder / "README.md").write_text("# A card")])
    check_files(saved)
    (saved / "README.md").write_text("# A card, edited by hand")
    check_files(saved)
    (saved / "modules.csv").write_text((saved / "modules.csv").read_text() + "\n")
    with pytest.raises(NullSpaceError, match=r"modules\.csv is truncated or altered.* again\.$"):
        check_files(saved)
    (saved / "modules.csv").unlink()
    with pytest.raises(NullSpaceError, match=r"has no modules\.csv"):
        check_files(saved)


def test_a_newer_format_is_refused(saved, bundle):
    assert bundle.config["format_version"] == FORMAT_VERSION
    newer = {"format_version": FORMAT_VERSION + 1, "spectra": "elsewhere"}
    (saved / "nullspace_config.json").write_text(json.dumps(newer))
    with pytest.raises(NullSpaceError, match=r"newer than the .* update this project\.$"):
        Bundle.load(saved)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(NullSpaceError, match=r"no nullspace_config\.json: it is not a bundle"):
        Bundle.load(tmp_path)
    with pytest.raises(NullSpaceError, match=r"The revision v1 is of a bundle on the Hub, and .* is a folder"):
        Bundle.load(tmp_path, revision="v1")
    with pytest.raises(NullSpaceError, match="There is no folder .*no Hub id"):
        Bundle.load(tmp_path / "none")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_again_replaces_the_whole_bundle(world, saved):
    (saved / "spectra.png").write_text("of the earlier bundle")
    alone = world.joint_bundle()

    def write_card(bundle, folder):
        assert bundle is alone
        (folder / "README.md").write_text("# A card")

    alone.save(saved, extras=[write_card])
    names = {"README.md", "modules.csv", "joint.safetensors", f"{TEXT_INPUT}.safetensors"}
    assert {path.name for path in saved.iterdir()} == names | {"nullspace_config.json"}
    assert set(Bundle.load(saved).config["files"]) == names
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def test_a_save_that_fails_leaves_the_earlier_bundle_untouched(world, saved):
    before = contents(saved)

    def fail(bundle, folder):
        (folder / "README.md").write_text("# Half a c")
        raise RuntimeError("no more paper")

    alone = world.joint_bundle()
    with pytest.raises(RuntimeError, match="no more paper"):
        alone.save(saved, extras=[fail])
    assert contents(saved) == before
    with pytest.raises(RuntimeError, match="no more paper"):
        alone.save(saved.with_name("new"), extras=[fail])
    assert not saved.with_name("new").exists()
    alone.save(saved)  # what was left behind is in nobody's way
    assert_same(Bundle.load(saved), alone)
    assert not (saved / "README.md").exists()


def test_saving_touches_nothing_else(bundle, saved):
    for name in ("bundle.old", "bundle.partial"):
        saved.with_name(name).mkdir()
        (saved.with_name(name) / "notes.txt").write_text("kept by the user")
    bundle.save(saved)
    for name in ("bundle.old", "bundle.partial"):
        assert contents(saved.with_name(name)) == {"notes.txt": b"kept by the user"}


def test_a_folder_that_holds_something_else_is_refused(bundle, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(NullSpaceError, match="not a bundle.*--output_dir"):
        bundle.save(tmp_path / "thesis")
    assert contents(tmp_path) == {"thesis/chapter.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    bundle.save(tmp_path / "empty")
    assert_same(Bundle.load(tmp_path / "empty", every_group=True), bundle)


def test_a_path_that_cannot_be_a_folder_is_refused(bundle, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(NullSpaceError, match="file is a file; choose a folder"):
        bundle.save(tmp_path / "file")
    for below in (tmp_path / "file" / "bundle", tmp_path / "file" / "deep" / "bundle"):
        with pytest.raises(NullSpaceError, match="cannot be written .*--output_dir"):
            bundle.save(below)
    assert contents(tmp_path) == {"file": b"text"}


def test_a_bundle_can_be_saved_in_the_current_folder(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle.save(Path("bundle"))
    assert_same(Bundle.load("bundle", every_group=True), bundle)


# ---- Whether a bundle fits a model -----------------------------------------------------------------------------------


def test_a_bundle_fits_the_model_that_it_was_built_from(any_world, tiny_sd1, tiny_sd2):
    bundle = any_world.bundle()
    bundle.check(any_world.unet)
    bundle.check(copy.deepcopy(any_world.unet).half())
    bundle.check(any_world.unet_with_lora(up=1.0))
    uncovered = copy.deepcopy(any_world.unet)
    torch.nn.init.zeros_(uncovered.conv_in.weight)
    with pytest.raises(NullSpaceError, match=r"fingerprints differ \(unet\)"):  # its layers read other inputs
        bundle.check(uncovered)


def test_a_bundle_does_not_fit_other_weights(world):
    bundle = world.bundle("cross")
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0"
    other = copy.deepcopy(world.unet)
    other.get_submodule(name).weight.data[3, 5] += 0.01
    with pytest.raises(NullSpaceError, match=r"other weights or settings \(tiny/model\).*fingerprints differ"):
        bundle.check(other)
    swapped = copy.deepcopy(world.unet)
    attention = swapped.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.to_k, attention.to_v = attention.to_v, attention.to_k
    with pytest.raises(NullSpaceError, match="fingerprints differ"):
        bundle.check(swapped)
    self_attention = copy.deepcopy(world.unet)
    self_attention.get_submodule(name.replace("attn2", "attn1")).weight.data.zero_()
    with pytest.raises(NullSpaceError, match="fingerprints differ"):
        bundle.check(self_attention)


def test_the_fingerprint_is_of_names_and_weights():
    unet = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2, bias=False) for name in "abc"})
    unet["c"].weight = unet["b"].weight
    assert fingerprint(unet, ["a", "b"]) == fingerprint(unet, ["b", "a"]) != fingerprint(unet, ["a", "c"])


def test_a_bundle_does_not_fit_another_architecture(world, tiny_sd2):
    bundle = world.bundle("cross")
    with pytest.raises(NullSpaceError, match=r"tiny/model.*attn2\.to_k is \(16, 32\).* is \(16, 48\)"):
        bundle.check(world_of(tiny_sd2).unet)
    config = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32}
    plain = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    with pytest.raises(NullSpaceError, match="covers no layer of this UNet"):
        bundle.check(UNet2DConditionModel(**config, **plain))
    plain |= {"down_block_types": ("CrossAttnDownBlock2D",), "attention_head_dim": 4}
    with pytest.raises(NullSpaceError, match="but here it is missing"):
        bundle.check(UNet2DConditionModel(**config, **plain))
