"""nullspace/verify.py: honest bundles hold on the model itself, forged ones are refused by name and figure."""

import copy
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from test_lcm import tiny_lcm  # noqa: F401

import build_nullspace
import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace import verify as room
from nullspace.bundle import Bundle
from nullspace.collection import collect, load_collected
from nullspace.errors import NullSpaceError
from nullspace.families import recognise
from nullspace.hashes import config_sha256
from nullspace.models import download_model
from nullspace.names import CONFIG_NAME, JOINT, LORA_NAME, TEXT_ENCODER, TEXT_INPUT
from nullspace.prompts import Prompts
from nullspace.samplers import make_scheduler
from nullspace.spectrum import in_double
from nullspace.verify import compare, refuse, verify
from test_train import command_line


PROMPTS = [f"a {size} {colour} star" for size in ("large", "small") for colour in ("red", "blue", "green", "white")]


class Case:
    """A tiny model's pipeline and an honest bundle of it, with all attention and the text encoder's."""

    def __init__(self, model, output_dir, sampling):
        words = f"--prompts_file - --attention all --with_text_encoder --timestep_groups steps {sampling}"
        args = build_nullspace.parse_args(
            ["--pretrained_model_name_or_path", str(model), "--output_dir", str(output_dir), *words.split()]
        )
        self.model, family = model, recognise(model)
        args.model_type = family.name
        for name, value in family.collection.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        prompts = Prompts(PROMPTS)
        base_model = download_model(model)
        self.pipeline = load_collected(family, base_model, prompts, print, args)
        own = self.pipeline.scheduler
        moments, groups, config, _ = collect(self.pipeline, prompts, base_model, args, PartialState())
        self.bundle = Bundle.from_moments(moments, groups, config)
        self.pipeline.scheduler = own

    def changed(self, change, only=None):
        """The bundle with `change(spectrum)` in place of each spectrum, or of one input's."""
        changed = Bundle(copy.deepcopy(self.bundle.config))
        changed.spectra = {
            group: {source: change(item) if only in (None, source) else item for source, item in spectra.items()}
            for group, spectra in self.bundle.spectra.items()
        }
        return changed


# Both samplers draw noise as they go
@pytest.fixture(scope="module")
def sd(tiny_sd1, tmp_path_factory):
    return Case(tiny_sd1, tmp_path_factory.mktemp("bundles") / "sd", "--sampler euler_a --num_inference_steps 6")


@pytest.fixture(scope="module")
def lcm(tiny_lcm, tmp_path_factory):  # noqa: F811
    return Case(tiny_lcm, tmp_path_factory.mktemp("bundles") / "lcm", "--num_inference_steps 2")


@pytest.fixture(params=["sd", "lcm"])
def case(request):
    return request.getfixturevalue(request.param)


def with_vectors(spectrum, vectors):
    """The spectrum with eigenvectors (in, in), all of them in float32."""
    return spectrum._replace(eigenvectors=vectors.contiguous(), rest=None)


def random_vectors(spectrum):
    size = len(spectrum.eigenvalues)
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return with_vectors(spectrum, torch.linalg.qr(noise).Q)


def reversed_vectors(spectrum):
    return with_vectors(spectrum, spectrum.orthonormal().flip(1))


def shuffled_where_held_back(spectrum):
    """Leading directions right; of the others, the least used are in the place of the most used ones."""
    rank, vectors = spectrum.rank(), spectrum.orthonormal()
    return with_vectors(spectrum, torch.cat([vectors[:, :rank], vectors[:, rank:].flip(1)], dim=1))


def nothing_held_back(spectrum):
    values = spectrum.eigenvalues.clone()
    values[spectrum.rank() :] = 0
    return spectrum._replace(eigenvalues=values)


FORGERIES = [random_vectors, reversed_vectors, shuffled_where_held_back, nothing_held_back]


def test_the_share_let_through_is_that_of_the_projector(sd):
    """tr(S C S) / tr(C), with S as a matrix, and C not the bundle's own but another one."""
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for source, spectrum in sd.bundle.group(JOINT).items():
        x = torch.randn(50, len(spectrum.eigenvalues), generator=generator)
        moments[source] = x.T @ x
    protected = {sd.bundle.modules[name]["input"]: item for name, item in sd.bundle.protected().items()}
    found = compare(sd.bundle, moments)
    assert {item.source for item in found} == set(moments)
    for item in found:
        basis, rank = protected[item.source].basis.double(), protected[item.source].rank
        gains = torch.cat([torch.zeros(rank).double(), protected[item.source].gains.double()])
        assert (item.size, item.closed) == (len(basis), rank)
        projector, closed = (basis * gains) @ basis.T, basis[:, :rank] @ basis[:, :rank].T
        stored = sd.bundle.group(JOINT)[item.source].sum()
        for total, through, held in (
            (stored, item.claimed, item.closed_claimed),
            (moments[item.source].double(), item.measured, item.closed_measured),
        ):
            assert math.isclose(through, (projector @ total @ projector).trace() / total.trace(), rel_tol=1e-3)
            assert math.isclose(held, (closed @ total @ closed).trace() / total.trace(), rel_tol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_bundle_holds(case, dtype):
    pipeline = case.pipeline.to(dtype)
    try:
        for seed in (0, 100):
            found = verify(case.bundle, pipeline, seed=seed)
            assert {item.source for item in found} == set(case.bundle.group(JOINT))
            assert {TEXT_INPUT, f"{TEXT_ENCODER}.encoder.layers.0.self_attn.q_proj"} < {item.source for item in found}
            refuse(found)
    finally:
        pipeline.to(torch.float32)


@pytest.mark.parametrize("change", FORGERIES)
def test_a_forged_bundle_is_refused(case, change):
    found = verify(case.changed(change), case.pipeline)
    worst = max(found, key=lambda item: item.measured / item.limit)
    with pytest.raises(NullSpaceError, match=re.escape(worst.source)) as caught:
        refuse(found)
    assert f"{worst.claimed:.1e}" in str(caught.value) and f"{worst.measured:.1e}" in str(caught.value)
    assert worst.measured > worst.claimed


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_bundle_of_another_weight_is_refused(sd, factor):
    """Which protects alone what it says, and beside other prompts nothing, or nothing of theirs."""
    source = next(name for name in sd.bundle.group(JOINT) if "to_q" in name)
    changed = sd.changed(lambda item: item._replace(eigenvalues=item.eigenvalues * factor), only=source)
    found = verify(changed, sd.pipeline)
    assert all(item.measured <= item.limit for item in found)
    with pytest.raises(NullSpaceError, match=f"of {re.escape(source)} it reads .* times the energy that the bundle"):
        refuse(found)


@pytest.mark.parametrize("kind", ["to_q", "to_out", TEXT_INPUT, "self_attn.q_proj"])
def test_one_forged_input_is_found_among_honest_ones(sd, kind):
    source = next(name for name in sd.bundle.group(JOINT) if kind in name)
    found = verify(sd.changed(reversed_vectors, only=source), sd.pipeline)
    assert [item.source for item in found if not item.holds] == [source]


def test_all_steps_give_the_moments_of_the_build(sd):
    """Drawn as it was built, all of its prompts let through what the bundle claims, to the noise of other seeds."""
    for item in verify(sd.bundle, sd.pipeline, prompts=len(PROMPTS), whole=True):
        assert item.measured < 2 * item.claimed
        assert abs(item.closed_measured - item.closed_claimed) < 0.05


def test_a_range_that_few_steps_do_not_visit_is_drawn_in_all(sd):
    bundle = sd.bundle.restrict(600, 700)
    first, last = bundle.config["groups"][0]["range"]
    scheduler = make_scheduler("euler_a", sd.pipeline.scheduler.config)
    assert not any(first <= timestep <= last for timestep in room.visited(scheduler, [room.STEPS]))
    refuse(verify(bundle, sd.pipeline))
    forged = Bundle(bundle.config, {name: dict(spectra) for name, spectra in bundle.spectra.items()})
    source = next(name for name in forged.spectra[JOINT] if name.endswith("to_q"))
    forged.spectra[JOINT][source] = reversed_vectors(forged.spectra[JOINT][source])
    assert [item.source for item in verify(forged, sd.pipeline) if not item.holds] == [source]
    forged.config["groups"][0]["range"] = [998, 998]
    with pytest.raises(NullSpaceError, match="visits no timestep from 998 to 998"):
        verify(forged, sd.pipeline)


def test_nothing_is_left_behind(case):
    """Neither numbers drawn from the global generator, nor hooks, nor another scheduler."""
    own, state = case.pipeline.scheduler, torch.get_rng_state()
    verify(case.bundle, case.pipeline)
    assert torch.equal(torch.get_rng_state(), state)
    assert case.pipeline.scheduler is own
    for model in (case.pipeline.unet, case.pipeline.text_encoder):
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_not_finite_is_refused(sd):
    weight = sd.pipeline.unet.conv_in.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(math.nan)
        with pytest.raises(NullSpaceError, match="contains NaN or infinity"):
            verify(sd.bundle, sd.pipeline)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_bundle_without_examples_is_verified_on_the_empty_prompt(sd):
    for change, holds in ((lambda spectrum: spectrum, True), (reversed_vectors, False)):
        bundle = sd.changed(change)
        bundle.config["prompts"]["examples"] = []
        assert all(item.holds for item in verify(bundle, sd.pipeline)) is holds


# ---- In the doors ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(sd, tmp_path_factory):
    """The honest bundle, and the one with one input's eigenvectors reversed, on disk, its hashes made to agree."""
    folder = tmp_path_factory.mktemp("folders")
    sd.bundle.save(folder / "honest")
    sd.changed(reversed_vectors, only=TEXT_INPUT).save(folder / "forged")
    return folder


def verify_command(*words):
    nullspace_utils.main(nullspace_utils.parse_args(["verify", *map(str, words)]))


def test_the_command_prints_a_row_for_each_input(sd, folders, capsys):
    verify_command("--nullspace", folders / "honest")
    few = capsys.readouterr().out
    verify_command("--nullspace", folders / "honest", "--pretrained_model_name_or_path", sd.model, "--prompts", 2)
    many = capsys.readouterr().out
    assert few != many
    for out, found in (
        (few, verify(sd.bundle, sd.pipeline)),
        (many, verify(sd.bundle, sd.pipeline, prompts=2, whole=True)),
    ):
        *rows, last = out.splitlines()[1:]
        assert [row.split()[0] for row in rows] == [item.source for item in found]
        shown = [(item.size, item.closed, f"{item.claimed:.1e}", f"{item.limit:.1e}") for item in found]
        assert [(int(row[1]), int(row[2]), row[3], row[5]) for row in map(str.split, rows)] == shown
        assert all(
            math.isclose(float(row.split()[4]), item.measured, rel_tol=0.1)
            for row, item in zip(rows, found, strict=True)
        )
        assert f"at all {len(found)} inputs" in last


def test_the_command_refuses_a_forged_bundle(sd, folders, capsys):
    with pytest.raises(NullSpaceError, match=f"of the energy of {TEXT_INPUT} it claims to let"):
        verify_command("--nullspace", folders / "forged", "--pretrained_model_name_or_path", sd.model)
    marked = [line for line in capsys.readouterr().out.splitlines() if "too much" in line]
    assert [line.split()[0] for line in marked] == [TEXT_INPUT]


def test_the_command_refuses_what_it_cannot_do(sd, folders, tiny_sd2):
    with pytest.raises(NullSpaceError, match="--prompts 9 is more than the 8 that the bundle ships"):
        verify_command("--nullspace", folders / "honest", "--prompts", 9)
    with pytest.raises(NullSpaceError, match="The bundle was built"):
        verify_command("--nullspace", folders / "honest", "--pretrained_model_name_or_path", tiny_sd2)
    config = json.loads((folders / "honest" / CONFIG_NAME).read_text()) | {"clip_skip": 2}
    shutil.copytree(folders / "honest", folders / "skips all")
    (folders / "skips all" / CONFIG_NAME).write_text(json.dumps(config | {"sha256": config_sha256(config)}))
    with pytest.raises(NullSpaceError, match="--clip_skip 2 leaves nothing of the text encoder"):
        verify_command("--nullspace", folders / "skips all", "--pretrained_model_name_or_path", sd.model)


def test_the_trainer_refuses_a_forged_bundle_before_it_trains(sd, folders, tmp_path, monkeypatch):
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    monkeypatch.setattr(trainer, "add_lora", lambda *_: pytest.fail("it went on"))
    with pytest.raises(NullSpaceError, match=f"of the energy of {TEXT_INPUT} it claims to let"):
        trainer.main(trainer.parse_args(command_line(sd.model, folders / "forged", tmp_path / "lora")))
    assert not (tmp_path / "lora" / LORA_NAME).exists()


# ---- Other devices ---------------------------------------------------------------------------------------------------


def test_what_is_cast_to_float64_is_moved_first():
    class OfApple:
        """A tensor of a device without float64, as far as `in_double` uses it."""

        def detach(self):
            return self

        def cpu(self):
            return torch.ones(2)

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    assert in_double(OfApple()).dtype == torch.float64


@pytest.mark.parametrize(
    ("device", "wide", "moved"),
    [("cpu", True, None), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", True, torch.float16)],
)
def test_a_model_is_on_a_gpu_in_16_bits(device, wide, moved, monkeypatch):
    calls = []
    monkeypatch.setattr(nullspace_utils, "PartialState", lambda: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: wide)
    nullspace_utils.to_device(SimpleNamespace(to=lambda *args: calls.append(args)))
    assert calls == ([] if moved is None else [(torch.device(device), moved)])
