"""What a saved LoRA promises: against the directions before any rounding, whatever the surroundings, or not saved."""

import copy
import json
import logging
import math
import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_nullspace_utils import TensorFloat32, worst_share

from nullspace import report as report_room
from nullspace import results
from nullspace.audit import leakage
from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.fingerprints import fingerprint
from nullspace.hashes import config_sha256, sha256
from nullspace.lora import LoraLayer, load_lora
from nullspace.moments import SecondMoments
from nullspace.names import CONFIG_NAME, JOINT, LORA_NAME, TEXT_ENCODER, TEXT_INPUT
from nullspace.projector import NullSpaceProjector, Protected
from nullspace.spectrum import Spectrum
from test_train import bundle1, drawing_in_two_steps, make_bundle, report, roomy_bundle1, same, train  # noqa: F401


UNPROTECTED = "unprotected_pytorch_lora_weights.safetensors"


def random_moment(size, decades=6):
    """A second moment (size, size) and its eigenvectors, largest first, in float64."""
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    moment = (basis * torch.logspace(1, 1 - decades, size, dtype=torch.float64)) @ basis.T
    return moment, torch.linalg.eigh(moment).eigenvectors.flip(1)


def lora_within(protected, rank=4):
    """A LoRA layer whose down-projection was projected in float64 into what a basis leaves free, then float32."""
    basis = protected.basis.double()
    free = basis[:, protected.rank :]
    down = torch.randn(rank, len(basis), dtype=torch.float64) @ free @ free.T
    return LoraLayer(down.float(), torch.randn(8, rank), 1.0)


# ---- What rounding hides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 96, 320])
def test_the_leakage_that_is_told_bounds_that_before_any_rounding(size):
    moment, exact = random_moment(size)
    spectrum = Spectrum.from_sum(moment * 100, 100)
    # The sign of an eigenvector is free
    difference = spectrum.eigenvectors.double() - exact * (spectrum.eigenvectors * exact).sum(0).sign()
    assert spectrum.distance() == pytest.approx(difference.norm().item(), rel=1e-2)
    assert 0 == spectrum.distance(0) < spectrum.distance() < 2e-6
    packed, hidden = spectrum.pack(), []
    assert 1 < packed.exact < size // 3
    for rank in (1, packed.exact, size // 3, size - 2):
        for item, bound in ((spectrum, 1e-5), (packed, 1e-5 if rank <= packed.exact else 2e-2)):
            protected = Protected(item.orthonormal(), rank, None, item.distance(rank))
            layer = lora_within(protected)
            change = layer.up.double() @ layer.down.double()
            true = ((change @ exact[:, :rank]).norm() / change.norm()).item()
            assert true <= leakage(layer, protected) < bound
        old = spectrum._replace(eigenvectors=spectrum.eigenvectors.half(), distances=None)
        protected = Protected(old.orthonormal(), rank, None, old.distance(rank))
        layer = lora_within(protected)  # as format 1 stored them: the figure was as small, and not so
        change = layer.up.double() @ layer.down.double()
        true = ((change @ exact[:, :rank]).norm() / change.norm()).item()
        assert leakage(layer, protected) < 1e-6
        hidden.append(true)
    assert max(hidden) > 2e-5


def test_a_bundle_records_how_far_it_lies(bundle1):  # noqa: F811
    config = json.loads((bundle1 / CONFIG_NAME).read_text())
    assert config["format_version"] == 3
    assert config["exact"].keys() == config["tokens"].keys()
    loaded = Bundle.load(bundle1, text_encoder=True, every_group=True)
    for name, tokens in config["tokens"].items():
        assert config["exact"][name].keys() == tokens.keys()
        for source in tokens:
            item = loaded.spectra[name][source]
            assert item.rank() == item.exact == config["exact"][name][source] < len(item.distances)
            assert item.distance() < 1e-6 < item.distance(len(item.distances)) < 1e-2
            assert (item.eigenvectors.dtype, item.rest.dtype) == (torch.float32, torch.float16)
    assert all(1e-6 > item.distance > 0 for item in loaded.protected().values())
    bounded = max(item.distance() for spectra in loaded.spectra.values() for item in spectra.values())
    assert f"at most {bounded:.1e}" in (bundle1 / "README.md").read_text()


@pytest.mark.parametrize("size", [96, 320])
def test_what_rounding_does_to_a_sum_is_not_bounded_by_what_it_does_to_its_parts(size):
    """Nor by that and the gap at the last closed direction, which would refuse every training."""
    moments = [random_moment(size)[0], random_moment(size + 1)[0][:size, :size]]
    parts = [Spectrum.from_sum(moment * 100, 100).pack() for moment in moments]
    spectrum = Spectrum.from_rounded(sum(part.sum() for part in parts), 200)
    exact = torch.linalg.eigh(sum(moments) / 2)
    rank, energies = spectrum.rank(), exact.eigenvalues.flip(0)
    protected = Protected(spectrum.orthonormal(), rank, None, spectrum.distance(rank))
    # The LoRA that reads the free direction that lies nearest to what is closed in the exact sum
    free = protected.basis[:, rank:].double()
    nearest = torch.linalg.svd(free.T @ exact.eigenvectors.flip(1)[:, :rank]).U[:, :1]
    layer = LoraLayer((free @ nearest).T.float(), torch.ones(8, 1), 1.0)
    hidden = (layer.down.double() @ exact.eigenvectors.flip(1)[:, :rank]).norm().item()
    assert leakage(layer, protected) < 1e-6 and hidden > 1e-4 > 100 * max(part.distance() for part in parts)
    perturbed = sum((2 * part.eigenvalues.double() * part.distances).norm() for part in parts) / 2
    assert perturbed / (energies[rank - 1] - energies[rank]) > 10 * hidden
    assert protected.distance is spectrum.drift_distance() is None


def test_bundles_made_of_several_do_not_know_how_far_they_lie(bundle1):  # noqa: F811
    bundle = Bundle.load(bundle1, text_encoder=True, every_group=True)
    first, second, third = (group["range"] for group in bundle.config["groups"][1:])
    moments = SecondMoments(None, {}, {})
    for source, item in bundle.spectra[JOINT].items():
        moments.sums[JOINT, source], moments.tokens[JOINT, source] = item.sum(), item.tokens
    emphasized = bundle.emphasize(moments, bundle.config["groups"][:1])
    assert emphasized.last_timestep == bundle.last_timestep == 999
    for made in (bundle.merge(bundle), bundle.restrict(first[0], second[1]), emphasized):
        for item in made.spectra[JOINT].values():
            assert item.distance() is None and item.eigenvectors.dtype == torch.float32
    alone = bundle.restrict(*third)  # made of nothing else
    assert alone.spectra[JOINT] == alone.spectra[alone.config["groups"][1]["name"]]


def test_a_range_of_timesteps_refuses_what_its_bundle_refuses(tiny_sd1, roomy_bundle1, tmp_path):  # noqa: F811
    folder = make_bundle(tiny_sd1, tmp_path / "bundle", "--attention", "self")  # whose inputs are all summed
    for timestep_range in (None, (0, 333), (0, 666)):
        bundle = Bundle.load(folder, timestep_range=timestep_range)
        bundle.protected()
        for criterion, threshold in (("energy", 0.99), ("percentile", 30)):
            with pytest.raises(NullSpaceError, match="in 16 bits; choose a"):
                bundle.protected(criterion=criterion, threshold=threshold)
        with pytest.raises(NullSpaceError, match="softness 1e-13 is too low"):
            bundle.protected(softness=1e-13)
    Bundle.load(roomy_bundle1, timestep_range=(0, 666)).protected(criterion="percentile", threshold=30)


# ---- Whatever the surroundings ---------------------------------------------------------------------------------------


def precisions():
    """All that this version of torch has to say about float32 products."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        return torch.get_float32_matmul_precision()
    backends = (torch.backends, matmul, torch.backends.mkldnn, torch.backends.mkldnn.matmul)
    return [backend.fp32_precision for backend in backends]


@contextmanager
def setting(owner, value):
    before, owner.fp32_precision = owner.fp32_precision, value
    try:
        yield
    finally:
        owner.fp32_precision = before


@contextmanager
def by_name(value):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def of_all_backends(value):
    with setting(torch.backends.cuda.matmul, "none"), setting(torch.backends, value):
        yield


newer = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="of torch 2.9 and above")
SURROUNDINGS = {
    "none": nullcontext,
    "high": lambda: by_name("high"),
    "medium": lambda: by_name("medium"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "of the GPU's products": lambda: setting(torch.backends.cuda.matmul, "tf32"),
    "of all backends": lambda: of_all_backends("tf32"),
    "of the CPU's products": lambda: setting(torch.backends.mkldnn.matmul, "bf16"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=newer) if name.startswith("of ") else name for name in SURROUNDINGS]
)
def test_nothing_around_it_makes_it_leak(name):
    """With the rounding of a GPU emulated; on a CPU that multiplies in bfloat16 there is its own besides."""
    moment, _ = random_moment(320)
    half = Spectrum.from_sum(moment, 1)
    half = half._replace(eigenvectors=half.eigenvectors.half())
    expected = half.orthonormal()
    with SURROUNDINGS[name](), TensorFloat32():
        before, probe = precisions(), torch.randn(320, 320)
        rounded = ((probe @ probe).double() - probe.double() @ probe.double()).norm() / (probe @ probe).norm()
        assert (rounded > 1e-4) == (name != "none") or name == "of the CPU's products"
        assert torch.equal(half.orthonormal(), expected)
        spectrum = Spectrum.from_sum(moment, 1)
        unet, protected = torch.nn.Module(), {}
        for number, rank in enumerate((100, 250, 250)):
            layer = torch.nn.Module()
            layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(320, 16, bias=False)})
            unet.add_module(f"layer{number}", layer)
            gains = spectrum.gains(1e-5)[rank:] if number else None
            protected[f"layer{number}"] = Protected(spectrum.orthonormal(), rank, gains, spectrum.distance())
        projector = NullSpaceProjector(unet, protected)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
        projector.attach(optimizer)
        for _ in range(3):
            for parameter in unet.parameters():
                parameter.grad = torch.randn_like(parameter)
            projector.project_gradients()
            optimizer.step()
        assert worst_share(projector, protected) < 1e-6
        assert precisions() == before
    for item, parameter in zip(protected.values(), projector.parameters.values(), strict=True):
        assert leakage(LoraLayer(parameter.detach(), torch.randn(8, 16), 1.0), item) < 1e-5


def test_weights_in_16_bits_are_projected_to_their_rounding():
    moment, _ = random_moment(96)
    spectrum = Spectrum.from_sum(moment, 1)
    for dtype in (torch.bfloat16, torch.float16):
        for gains in (None, spectrum.gains(1e-5)[30:]):
            unet, layer = torch.nn.Module(), torch.nn.Module()
            layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(96, 8, bias=False, dtype=dtype)})
            unet.add_module("layer", layer)
            item = Protected(spectrum.orthonormal(), 30, gains, spectrum.distance())
            projector = NullSpaceProjector(unet, {"layer": item})
            optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
            projector.attach(optimizer)
            before = layer.lora_A["default"].weight.clone()
            for _ in range(3):
                layer.lora_A["default"].weight.grad = torch.randn(8, 96).to(dtype)
                projector.project_gradients()
                optimizer.step()
            after = layer.lora_A["default"].weight.detach()
            assert after.dtype == dtype and not torch.equal(after, before)
            assert 1e-6 < leakage(LoraLayer(after, torch.randn(8, 8), 1.0), item) < 4e-3


# ---- A file that breaks it -------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_file_above_its_bound_takes_no_good_ones_place(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    output = tmp_path / "lora"
    train(tiny_sd1, bundle1, output)
    good, save = contents(output), report_room.save_lora
    assert LORA_NAME in good and not list(output.glob("*partial*"))
    with monkeypatch.context() as patch:  # a wrong dtype
        patch.setattr(
            report_room, "save_lora", lambda *args, dtype, **models: save(*args, **models, dtype=torch.bfloat16)
        )
        pushed = []
        patch.setattr(results, "push_folder", lambda *args, **kwargs: pushed.append(args))
        with pytest.raises(NullSpaceError) as error:
            train(tiny_sd1, bundle1, output, "--seed", 1)
    assert not pushed
    text = str(error.value)
    bound = report_room.LEAKAGE_BOUNDS[torch.float32]
    assert "The LoRA breaks its promise" in text and str(output / UNPROTECTED) in text
    assert f"{bound:g} is the bound of a float32 file" in " ".join(text.split())
    now = contents(output)
    assert now.pop(UNPROTECTED) and now == good
    assert load_file(output / UNPROTECTED).popitem()[1].dtype == torch.bfloat16
    assert {layer.down.dtype for layer in load_lora(output).values()} == {torch.float32}  # audits take the good one
    train(tiny_sd1, bundle1, output)
    assert contents(output).keys() == good.keys()


def test_a_failed_file_is_alone_where_no_good_one_was(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(report_room.LEAKAGE_BOUNDS, torch.bfloat16, 1e-9)
    flags = ("--mixed_precision", "bf16", "--no-upcast_before_saving", "--max_train_steps", 1)
    with pytest.raises(NullSpaceError, match="a 16-bit file .* pass --upcast_before_saving"):
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert list(contents(tmp_path / "lora")) == [UNPROTECTED]


def test_leakage_that_is_not_a_number_is_above_any_bound(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    audit = report_room.audit_file

    def audit_file(*args):
        found = audit(*args)
        found["layers"][1]["leakage"] = math.nan
        return found

    monkeypatch.setattr(report_room, "audit_file", audit_file)
    with pytest.raises(NullSpaceError, match="nan of what it changes"):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--max_train_steps", 1)


# ---- What is said of it ----------------------------------------------------------------------------------------------


SAID = {
    "guaranteed": ((), "Guaranteed: at most "),
    "16 bits": (("--mixed_precision", "bf16", "--no-upcast_before_saving"), "is the rounding of its weights to 16"),
    "extra prompts": (
        ("--nullspace_extra_prompts", "a star"),
        "Guaranteed: .* alone: .* sum that is made of rounded directions",
    ),
    "range": (
        ("--nullspace_timestep_range", 0, 666),
        "Guaranteed: .* alone: .* sum that is made of rounded directions",
    ),
    "zero": (("--nullspace_threshold", 0), "Nothing is guaranteed: .*--nullspace_threshold 0"),
    "some": (
        ("--lora_layers", "attn1.to_q,attn2.to_q", "--allow_unprotected"),
        r"Nothing is guaranteed: 7 of 14 layers are unprotected .* of the others at most \d",
    ),
    "none": (
        ("--lora_layers", "attn1.to_q", "--allow_unprotected"),
        r"Nothing is guaranteed: .*none of its layers is protected",
    ),
}


def test_a_softness_below_what_is_stored_is_refused(bundle1, tmp_path):  # noqa: F811
    bundle = Bundle.load(bundle1)
    bundle.protected(softness=1e-7)
    with pytest.raises(NullSpaceError, match=r"--nullspace_softness 1e-13 is too low for .* choose at least 1e-"):
        bundle.protected(softness=1e-13)
    Bundle.load(write_old_format(bundle1, tmp_path / "bundle", 2)).protected(softness=1e-13)


@pytest.mark.parametrize("case", SAID)
def test_report_and_card_say_it_first(case, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    flags, expected = SAID[case]
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--max_train_steps", 1)
    found = report(tmp_path / "lora")
    assert next(iter(found)) == "guarantee"
    said = found["guarantee"]
    assert re.search(expected, said)
    assert ("Guaranteed" in said) == (not expected.startswith("Nothing")) and "old format" not in said
    assert ("rounded directions" in said) == (case in ("extra prompts", "range"))
    card = (tmp_path / "lora" / "README.md").read_text().split("\n---\n", 1)[1].strip().splitlines()
    assert card[0].startswith("# ") and card[2] == said
    if case in ("guaranteed", "some"):
        assert found["leakage"]["max"] < 1e-5


# ---- Bundles of format 1 ---------------------------------------------------------------------------------------------


def write_old_format(source, folder, version, unet=None, text_encoder=None):
    """The bundle in a folder as format 1 or 2 laid it out."""
    bundle = Bundle.load(source, text_encoder=True, every_group=True)
    config = copy.deepcopy(bundle.config)
    folder.mkdir()
    for name in config["files"]:
        (folder / name).write_bytes((source / name).read_bytes())
    for name, spectra in bundle.spectra.items():
        tensors = {}
        for key, item in spectra.items():
            vectors = item.orthonormal()
            tensors[f"{key}.eigenvalues"] = item.eigenvalues
            tensors[f"{key}.eigenvectors"] = vectors.half() if version == 1 else vectors
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    config["distances"] = {name: dict.fromkeys(inputs, 3e-7) for name, inputs in config.pop("exact").items()}
    config |= {"format_version": version, "dtype": "float16" if version == 1 else "float32"}
    if version == 1:
        del config["distances"]
        own = config[TEXT_ENCODER]["modules"]
        config["base_model"]["fingerprint"] = fingerprint(unet, config["modules"])
        config[TEXT_ENCODER]["fingerprint"] = fingerprint(unet, own, text_encoder=text_encoder)
    config["files"] = {name: sha256(folder / name) for name in config["files"]}
    config["sha256"] = config_sha256(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_sd1):
    return StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)


@pytest.fixture(scope="module")
def old_bundle(bundle1, pipeline, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("old") / "bundle"
    return write_old_format(bundle1, folder, 1, pipeline.unet, pipeline.text_encoder)


def test_a_bundle_of_format_2_is_read_bit_by_bit(bundle1, pipeline, tmp_path):  # noqa: F811
    folder = write_old_format(bundle1, tmp_path / "bundle", 2)
    bundle = Bundle.load(folder, text_encoder=True, every_group=True)
    bundle.check(pipeline.unet, pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    protected = bundle.protected()
    for name in bundle.spectra:
        stored = load_file(folder / f"{name}.safetensors")
        for source, item in bundle.spectra[name].items():
            assert torch.equal(item.orthonormal(), stored[f"{source}.eigenvectors"])
            assert all(item.distance(rank) == pytest.approx(3e-7) for rank in (1, 5, len(item.distances)))
            for module, info in bundle.modules.items():
                if info["input"] == source and name in (JOINT, TEXT_INPUT, TEXT_ENCODER):
                    assert torch.equal(protected[module].basis, stored[f"{source}.eigenvectors"])
    bundle.save(tmp_path / "packed")
    packed = Bundle.load(tmp_path / "packed", text_encoder=True, every_group=True)
    joint = [(folder / "joint.safetensors").stat().st_size for folder in (folder, tmp_path / "packed")]
    assert packed.config["format_version"] == 3 and joint[1] < 0.8 * joint[0]
    for module, item in packed.protected().items():
        assert torch.equal(item.basis[:, : item.rank], protected[module].basis[:, : item.rank])


def test_a_bundle_of_format_1_is_read_as_it_was(old_bundle, pipeline, tmp_path, caplog):
    bundle = Bundle.load(old_bundle, text_encoder=True, every_group=True)
    for name in bundle.spectra:
        for item in bundle.spectra[name].values():
            assert item.eigenvectors.dtype == torch.float16 and item.distance() is None
            vectors = item.eigenvectors.float()
            assert torch.equal(item.orthonormal(), 1.5 * vectors - 0.5 * vectors @ (vectors.T @ vectors))
    bundle.check(pipeline.unet, pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    assert "is of the old format" in caplog.text and "is not known" in caplog.text
    other = copy.deepcopy(pipeline.unet)
    other.conv_in.weight.data.zero_()
    bundle.check(other)  # which is what it does not know
    other.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight.data[0, 0] += 1
    with pytest.raises(NullSpaceError, match=r"the fingerprints differ \(unet\)"):
        bundle.check(other)
    text_encoder = copy.deepcopy(pipeline.text_encoder)
    next(p for name, p in text_encoder.named_parameters() if name.endswith("v_proj.weight")).data[0, 0] += 1
    with pytest.raises(NullSpaceError, match=r"the fingerprints differ \(text encoder\)"):
        bundle.check(pipeline.unet, text_encoder)

    bundle.merge(bundle).save(tmp_path / "merged")
    merged = Bundle.load(tmp_path / "merged")
    merged.check(pipeline.unet)
    assert all(item.distance() is None for item in merged.group(JOINT).values())


def test_a_run_on_a_bundle_of_format_1_says_what_it_is_measured_against(tiny_sd1, old_bundle, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        first = train(tiny_sd1, old_bundle, tmp_path / "lora", "--max_train_steps", 1)
    assert "is of the old format" in caplog.text
    said = report(tmp_path / "lora")["guarantee"]
    assert said.startswith("Guaranteed") and "measured against the bundle's own directions alone" in said
    assert said in (tmp_path / "lora" / "README.md").read_text()
    protected = Bundle.load(old_bundle).protected()
    assert max(leakage(layer, protected[name]) for name, layer in load_lora(tmp_path / "lora").items()) < 1e-5
    assert same(first, train(tiny_sd1, old_bundle, tmp_path / "again", "--max_train_steps", 1))
