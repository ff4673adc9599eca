"""A finished LoRA, moved into the null space in closed form."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import nullspace_utils
from nullspace.adapters import write_layers
from nullspace.embeddings import read_words
from nullspace.errors import NullSpaceError
from nullspace.lora import LoraLayer, load_lora
from nullspace.names import TEXT_ENCODER, WORD_NAME
from nullspace.projector import Protected
from nullspace.repair import audit_repairable, kept, repair_layer
from nullspace.spectrum import Spectrum
from test_train import bundle1, drawing_in_two_steps, same, train  # noqa: F401


def moment(size, seed):
    """A second moment (size, size) of inputs whose directions have very different shares."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, size, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, size)
    x = x @ torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return x.T @ x / len(x)


@pytest.mark.parametrize("drift_weight", [0.0, 0.3, 10.0])
def test_no_other_layer_of_the_null_space_is_nearer(drift_weight):
    """Against a numerical optimum of what it is said to minimise."""
    size, rank = 16, 5
    spectrum, subject = Spectrum.from_sum(moment(size, 1) * 100, 100), moment(size, 2)
    protected = Protected(spectrum.orthonormal(), rank)
    layer = LoraLayer(torch.randn(3, size), torch.randn(8, 3), 0.5)
    found = repair_layer(layer, protected, spectrum, subject, drift_weight)
    assert torch.equal(found.up, layer.up) and found.scale == layer.scale
    assert (found.down @ protected.basis[:, :rank]).norm() < 1e-5 * found.down.norm()

    free = protected.basis[:, rank:].double()
    c, s = moment(size, 1) / moment(size, 1).trace(), subject / subject.trace()
    coordinates = torch.zeros(3, size - rank, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coordinates], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        down = coordinates @ free.T
        difference = down - layer.down.double()
        value = ((difference @ s) * difference).sum() + drift_weight * ((down @ c) * down).sum()
        value = value + 1e-6 * coordinates.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(found.down.double(), (coordinates @ free.T).detach(), rtol=1e-3, atol=1e-3)
    assert kept(layer, layer, subject) == pytest.approx(1) and 0 < kept(layer, found, subject) < 1


@pytest.fixture(scope="module")
def plain(tiny_sd1, bundle1, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("plain") / "lora"
    train(tiny_sd1, bundle1, folder, "--nullspace_threshold", 0, "--train_text_encoder")
    nullspace_utils.main(nullspace_utils.parse_args(
        ["export", "--lora", str(folder), "--output", str(folder / "kohya.safetensors")]
    ))  # fmt: skip
    return folder


def repair(lora, bundle, output, *flags):
    words = ["repair", "--lora", lora, "--nullspace", bundle, "--output_dir", output, *flags]
    nullspace_utils.main(nullspace_utils.parse_args([str(word) for word in words]))
    return load_lora(output)


def test_a_plain_lora_is_repaired(plain, tiny_sd1, bundle1, tmp_path, capsys):  # noqa: F811
    """In diffusers' form and in kohya's; with more weight on the drift it drifts less, and keeps less."""
    anyhow = repair(plain, bundle1, tmp_path / "anyhow")
    of_kohya = repair(plain / "kohya.safetensors", bundle1, tmp_path / "of-kohya")
    for name, layer in anyhow.items():
        torch.testing.assert_close(layer.down, of_kohya[name].down)
    assert "of the LoRA's change (mean of its layers)" in capsys.readouterr().out
    told = {}
    for weight in (0.1, 10):
        flags = ("--instance_prompt", "a photo of a sks star", "--drift_weight", weight)
        repair(plain, bundle1, tmp_path / f"prompted-{weight}", *flags)
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.count("e-") or line.count("e+")]
        told[weight] = [[float(value.rstrip("%")) for value in row[1:]] for row in rows if row[1].endswith("%")]
    assert len(told[10]) == len(anyhow) and max(row[3] for row in told[10]) < 1e-5
    assert all(0 < few[0] < many[0] <= 100 for few, many in zip(told[10], told[0.1], strict=True))
    assert all(few[2] < many[2] < many[1] for few, many in zip(told[10], told[0.1], strict=True))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "prompted-10")
    names = {name for name, _ in pipeline.unet.named_parameters() if "lora_A" in name}
    assert len(names) == sum(not name.startswith("text_encoder") for name in anyhow)


def test_a_word_is_read_and_goes_along(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    """Of a folder, and of a file that bundles it, which diffusers by itself does not read."""
    flags = ("--placeholder_token", "sks-star", "--initializer_token", "star", "--num_vectors", 2)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--instance_prompt", "a sks-star", "--output_kohya_format")
    (word,) = read_words(tmp_path / "lora" / WORD_NAME)
    read = []

    def subject_moments(pipeline, *args):
        tokens = pipeline.tokenizer.convert_tokens_to_ids(["sks-star", "sks-star_1"])
        read.append(pipeline.text_encoder.get_input_embeddings().weight[tokens])
        return drawn(pipeline, *args)

    drawn = nullspace_utils.subject_moments
    monkeypatch.setattr(nullspace_utils, "subject_moments", subject_moments)
    with pytest.raises(NullSpaceError, match="does not name the LoRA's subject; write sks-star in it"):
        repair(tmp_path / "lora", bundle1, tmp_path / "none", "--instance_prompt", "a star")
    for number, lora in enumerate((tmp_path / "lora", tmp_path / "lora" / "lora.safetensors")):
        repair(lora, bundle1, tmp_path / str(number), "--instance_prompt", "a sks-star")
        torch.testing.assert_close(read[number].detach().cpu(), word.rows[TEXT_ENCODER], rtol=0, atol=0)
        assert same(word.rows, read_words(tmp_path / str(number) / WORD_NAME)[0].rows)


def test_what_cannot_be_repaired_is_refused(plain, bundle1, tmp_path):  # noqa: F811
    with pytest.raises(NullSpaceError, match="holds the LoRA itself"):
        repair(plain, bundle1, plain)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "nullspace_report.json").write_text("{}")  # of another LoRA
    with pytest.raises(NullSpaceError, match="used holds other files; name an empty folder"):
        repair(plain, bundle1, tmp_path / "used")
    (tmp_path / "file").touch()
    with pytest.raises(NullSpaceError, match="--output_dir .*file is a file; choose a folder"):
        repair(plain, bundle1, tmp_path / "file")
    layers = load_lora(plain)
    name, layer = next(item for item in layers.items() if item[0].endswith("attn2.to_q"))
    write_layers(tmp_path, {name.replace("attn2", "attn1"): layer})
    with pytest.raises(NullSpaceError, match=r"closes no direction of .*attn1\.to_q, which would go on"):
        repair(tmp_path, bundle1, tmp_path / "new")
    with pytest.raises(NullSpaceError, match=f"{name} .* of a DoRA"):
        audit_repairable({name: layer._replace(magnitude=torch.ones(len(layer.up)))}, None)
    assert not (tmp_path / "new").exists()
