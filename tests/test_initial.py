"""--init_lora: what is gone on from, what projecting it costs, and what is refused."""

import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.lora import load_lora
from nullspace.names import LORA_NAME, WORD_NAME
from test_train import bundle1, command_line, drawing_in_two_steps, report, same, train, worst_leakage  # noqa: F401
from train_dreambooth_nullspace import main, parse_args


STILL = ("--learning_rate", 1e-12, "--max_train_steps", 1)


@pytest.fixture(scope="module")
def plain(tiny_sd1, bundle1, tmp_path_factory):  # noqa: F811
    """A LoRA of UNet and text encoder that was trained without protection, of rank 3 at scale 2, and kohya's file."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    flags = ("--train_text_encoder", "--nullspace_threshold", 0, "--rank", 3, "--lora_alpha", 6)
    train(tiny_sd1, bundle1, folder, *flags, "--output_kohya_format")
    return folder


@pytest.fixture(scope="module")
def ours(tiny_sd1, bundle1, tmp_path_factory):  # noqa: F811
    """One that was trained in the null space, on some of the layers."""
    folder = tmp_path_factory.mktemp("ours") / "lora"
    train(tiny_sd1, bundle1, folder, "--lora_layers", "attn2.to_k,attn2.to_v")
    return folder


def near(first, second, distance=1e-11):
    return torch.allclose(first, second, rtol=0, atol=distance)


def go_on(model, bundle, output, lora, *flags):
    return train(model, bundle, output, "--init_lora", lora, *flags, without=["--rank"])


@pytest.mark.parametrize("name", [".", "plain.safetensors"], ids=["diffusers", "kohya"])
def test_a_plain_lora_is_projected_and_the_cost_told(name, plain, tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO):
        go_on(tiny_sd1, bundle1, tmp_path / "lora", plain / name, "--train_text_encoder", *STILL)
    before, after = load_lora(plain), load_lora(tmp_path / "lora")
    protected = Bundle.load(bundle1, text_encoder=True).protected()
    shares = []
    for name, layer in before.items():
        closed = protected[name].basis[:, : protected[name].rank].double()
        down = layer.down.double()
        expected = down - down @ closed @ closed.T
        assert (after[name].down - expected).norm() < 1e-6 * down.norm()
        assert near(after[name].up, layer.up) and after[name].scale == layer.scale == 2
        change = layer.up.double() @ down
        shares.append(((change - layer.up.double() @ expected).norm() / change.norm()).item())
    assert after.keys() == before.keys() and len(shares) == 36
    mean, most = re.search(
        r"removed ([\d.]+)% of its change \(mean of 36 layers, at most ([\d.]+)%\)", caplog.text
    ).groups()
    assert float(mean) == pytest.approx(100 * sum(shares) / 36, abs=0.06)
    assert float(most) == pytest.approx(100 * max(shares), abs=0.06) and max(shares) > 0.5
    assert worst_leakage(tmp_path / "lora", bundle1) < 1e-5
    found = report(tmp_path / "lora")["training"]
    assert (found["rank"], found["lora_alpha"]) == (3, 6) and found["init_lora"] in ("plain", "plain.safetensors")
    assert f"went on from another LoRA, `{found['init_lora']}`" in (tmp_path / "lora" / "README.md").read_text()


def test_training_goes_on_from_it_and_resumes(plain, ours, tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    """Every layer moves and stays below the bound; what it went on from is known by its weights, not by its name."""
    flags = ("--train_text_encoder", "--max_train_steps", 4, "--checkpointing_steps", 2)
    whole = go_on(tiny_sd1, bundle1, tmp_path / "lora", plain, *flags)
    assert worst_leakage(tmp_path / "lora", bundle1) < 1e-5
    before = load_file(plain / LORA_NAME)
    assert before.keys() == whole.keys() and not any(torch.equal(before[key], whole[key]) for key in whole)
    shutil.copy(plain / "plain.safetensors", tmp_path / "moved.safetensors")
    flags += ("--resume_from_checkpoint", "checkpoint-2")
    assert same(go_on(tiny_sd1, bundle1, tmp_path / "lora", tmp_path / "moved.safetensors", *flags), whole)
    tensors = load_file(plain / LORA_NAME)
    tensors[min(tensors)] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    for lora in ("--init_lora", tmp_path / "other.safetensors", "--lora_alpha", 3), ("--rank", 3):
        with pytest.raises(NullSpaceError, match=r"the LoRA gone on from \(--init_lora\): sha256 .* in the checkpoint"):
            train(tiny_sd1, bundle1, tmp_path / "lora", *flags, *lora, without=["--rank"])


def test_one_of_the_null_space_loses_nothing(ours, tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    """Nor is it held back a second time; layers, too, are its own."""
    with caplog.at_level(logging.INFO):
        after = go_on(tiny_sd1, bundle1, tmp_path / "lora", ours, *STILL)
    assert "removed 0.0% of its change (mean of 14 layers, at most 0.0%)" in caplog.text
    before = load_file(ours / LORA_NAME)
    assert before.keys() == after.keys()
    assert all(near(after[key], before[key], 1e-6) for key in before)


def test_its_word_is_taken_along_or_missed_aloud(tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    flags = ("--placeholder_token", "sks-star", "--initializer_token", "star", "--instance_prompt", "a sks-star")
    flags += ("--validation_prompt", "a sks-star", "--num_vectors", 2)
    first, still = tmp_path / "first", (*STILL, "--word_learning_rate", 1e-12)
    train(tiny_sd1, bundle1, first, *flags, "--output_kohya_format", "--max_train_steps", 2)
    rows = load_file(first / WORD_NAME)["sks-star"]
    for lora in (first, first / LORA_NAME, first / "first.safetensors"):
        go_on(tiny_sd1, bundle1, tmp_path / "lora", lora, *flags, *still)
        assert near(load_file(tmp_path / "lora" / WORD_NAME)["sks-star"], rows)
    assert "not taken along" not in caplog.text
    with pytest.raises(NullSpaceError, match="has 2 rows of sks-star; pass --num_vectors 2."):
        go_on(tiny_sd1, bundle1, tmp_path / "lora", first, *flags, "--num_vectors", 1)
    go_on(tiny_sd1, bundle1, tmp_path / "lora", first, *STILL)
    assert "was trained with sks-star, which is not taken along" in caplog.text


def test_where_nothing_is_closed_it_stays_as_it_is(ours, tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO):
        after = go_on(tiny_sd1, bundle1, tmp_path / "lora", ours, *STILL, "--nullspace_threshold", 0)
    assert f"Going on from {ours} as it is: nothing is closed to it" in caplog.text
    assert all(near(after[key], tensor) for key, tensor in load_file(ours / LORA_NAME).items())
    assert "--nullspace_threshold 0" in report(tmp_path / "lora")["guarantee"]


@pytest.mark.parametrize(
    ("lora", "flags", "message"),
    [
        ("missing", [], "^--init_lora: .*missing, no folder or file here, cannot be read as a LoRA"),
        ("plain", ["--train_text_encoder", "--rank", 4], "--rank 4 contradicts .*, whose own is 3; leave --rank out"),
        ("plain", ["--train_text_encoder", "--lora_alpha", 3], "--lora_alpha 3 contradicts .*, whose own is 6; leave"),
        ("plain", [], "has layers of the text encoder; pass --train_text_encoder"),
        ("ours", ["--train_text_encoder"], "has no layers of the text encoder; leave out --train_text_encoder"),
        ("ranks", [], r"has several ranks \(1, 2\)"),
        ("nan", [], "holds NaN or infinity"),
        ("dora", [], "is a DoRA"),
        (
            "ours",
            ["--lora_layers", "attn2.to_k,to_q"],
            r"lacks attn1.to_q \(7\), attn2.to_q \(7\) and it has attn2.to_v",
        ),
        ("foreign", [], r"was made for another model: its \S+ is \(16, 31\), and in .* it is \(16, 32\)"),
        ("beyond", [], "leaves 1 layers to train unprotected"),
    ],
)
def test_what_cannot_be_gone_on_from(lora, flags, message, plain, ours, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    tensors, path = load_file(ours / LORA_NAME), {"plain": plain, "ours": ours}.get(lora, tmp_path / lora)
    down = next(key for key in tensors if "down_blocks.0" in key and key.endswith("to_k.lora.down.weight"))
    up, layer = down.replace(".down.weight", ".up.weight"), down.removesuffix(".lora.down.weight")
    changes = {
        "ranks": {down: tensors[down][:1], up: tensors[up][:, :1]},
        "nan": {down: tensors[down] * float("nan")},
        "dora": {f"{layer}.lora_magnitude_vector": torch.ones(len(tensors[up]))},
        "foreign": {down: tensors[down][:, 1:]},
        "beyond": {key.replace("attn2", "attn1").replace("to_k", "to_q"): tensors[key][:, :16] for key in (down, up)},
    }
    if lora in changes:
        save_file(
            {
                name: each.clone(memory_format=torch.contiguous_format)
                for name, each in (tensors | changes[lora]).items()
            },
            path,
        )
    argv = command_line(tiny_sd1, bundle1, tmp_path / "lora", "--init_lora", path, *flags, without=["--rank"])
    with pytest.raises(NullSpaceError, match=message) as caught:
        main(parse_args(argv))
    assert "\n" not in str(caught.value) and not (tmp_path / "lora" / LORA_NAME).exists()
