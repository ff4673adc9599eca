"""--enable_bucket: pictures in their own shapes, and batches of one size."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from diffusers import UNet2DConditionModel
from PIL import Image

import train_dreambooth_nullspace as trainer
from nullspace.buckets import bucket_sizes, common_multiple, nearest_size
from nullspace.dataset import InstanceDataset, epoch_batches, make_dataloader
from nullspace.errors import NullSpaceError
from nullspace.pictures import ORIGINAL_SIZE
from test_train import bundle1, command_line, drawing_in_two_steps, report, same, train  # noqa: F401 (fixtures)


SIZES = bucket_sizes(32, 8)
SHAPES = [(58, 96), (60, 100), (90, 150), (100, 60), (20, 20)]  # three tall ones, a wide and a small one


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SHAPES):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{number}.png")
    return folder


def dataset_of(*flags, shapes=SHAPES):
    args = trainer.parse_args(command_line("m", "b", "o", "--enable_bucket", *flags))
    pictures = [Image.effect_noise(shape, 90).convert("RGB") for shape in shapes]
    return InstanceDataset(pictures, [[number] for number in range(len(pictures))], args, SIZES)


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (1024, 32), (768, 64), (520, 64), (32, 8), (64, 64)])
def test_sizes_are_of_one_area_and_fit_the_model(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert (resolution // multiple * multiple,) * 2 in sizes
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2 and max(width, height) <= 4 * min(width, height)
        assert (width + height + 2 * multiple) ** 2 > 4 * resolution**2  # the next larger one would be too large


def test_the_sizes_of_real_models():
    assert common_multiple([128, 256, 512, 512], [320, 640, 1280, 1280]) == 64
    assert common_multiple([128, 256, 512, 512], [320, 640, 1280]) == 32
    assert [size for size in bucket_sizes(512, 64) if size[0] <= size[1] <= 768] == [
        (320, 704), (320, 768), (384, 640), (448, 576), (512, 512)
    ]  # fmt: skip
    # Some that arXiv 2307.01952 lists
    assert {(512, 2048), (704, 1408), (832, 1216), (896, 1152), (1024, 1024)} <= set(bucket_sizes(1024, 32))
    with pytest.raises(NullSpaceError, match="multiples of 64 pixels .* --resolution 32 is too small for"):
        bucket_sizes(32, 64)


def test_a_picture_has_the_size_that_shows_most_of_it():
    sizes = bucket_sizes(512, 64)
    for size in ((3000, 4000), (4000, 3000), (500, 500), (100, 900), (1920, 1080), (17, 29)):
        shown = {
            target: min(size[0] * target[1], size[1] * target[0]) / max(size[0] * target[1], size[1] * target[0])
            for target in sizes
        }
        assert math.isclose(shown[nearest_size(size, sizes)], max(shown.values()))
    assert nearest_size((3000, 4000), sizes) == (448, 576) and nearest_size((1, 1), sizes) == (512, 512)


def test_pictures_cover_their_size_and_the_framing_is_true():
    """Height and width of the file, top and left of the crop once it is resized, and mirrored, height and width cut."""
    dataset = dataset_of("--random_flip")
    dataset.pictures[0].info[ORIGINAL_SIZE] = SHAPES[0]
    for number, (shape, size) in enumerate(zip(SHAPES, [(24, 40)] * 3 + [(40, 24), (32, 32)], strict=True)):
        whole = dataset.processor.preprocess(dataset.pictures[number])[0]
        slack = [whole.shape[2] - size[0], whole.shape[1] - size[1]]
        assert min(slack) == 0 and max(slack) <= 1  # nothing is lost but by the shape
        for flip in (False, True):
            picture, framing = dataset.picture(number, flip)
            height, width, top, left, *cut = map(int, framing)
            assert (width, height) == shape and tuple(reversed(cut)) == size
            shown = whole.flip(-1) if flip else whole
            assert torch.equal(picture, shown[:, top : top + size[1], left : left + size[0]])
    before = [dataset[index][2] for index in range(5)]
    dataset.cache(lambda pixels: pixels)
    assert all(torch.equal(dataset[index][2], framing) for index, framing in enumerate(before))
    assert [tuple(dataset[index][0].shape) for index in range(5)] == [(3, 40, 24)] * 3 + [(3, 24, 40), (3, 32, 32)]


def batches_of(processes, dataset, epoch, done=0):
    """The captions' numbers, which are the pictures', in the batches that each process is given."""
    accelerator, given = SimpleNamespace(skip_first_batches=skip_first_batches), []
    dataloader = make_dataloader(dataset, processes, dataset.args)
    settings = {"num_processes": processes, "use_seedable_sampler": True, "even_batches": False}
    for index in range(processes):
        prepared = prepare_data_loader(dataloader, process_index=index, put_on_device=False, **settings)
        batches = list(epoch_batches(accelerator, dataset, prepared, epoch, done))
        for pictures, numbers, _ in batches:  # which the dataloader could not stack otherwise
            assert {dataset.sizes[number] for number in numbers.tolist()} == {tuple(pictures.shape[:1:-1])}
        assert len(prepared) == len(dataloader) // processes
        given.append([numbers.tolist() for _, numbers, _ in batches])
    return given


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_of_one_size_and_each_picture_comes_once(processes):
    """16 of 24 x 40 and 4 of two other sizes each; all orders depend on seed and epoch alone."""

    def load(*flags):
        return dataset_of("--repeats", 4, "--train_batch_size", 3, *flags, shapes=[*SHAPES, (59, 98)])

    dataset = load()
    first, second = (batches_of(processes, dataset, epoch) for epoch in (0, 1))
    for given in (first, second):
        numbers = [number for own in given for batch in own for number in batch]
        assert sorted(numbers) == sorted(list(range(6)) * 4)
        assert [len(own) for own in given] == [10 // processes] * processes
    assert first != second and first == batches_of(processes, load(), 0) != batches_of(processes, load("--seed", 1), 0)
    assert [own[2:] for own in second] == batches_of(processes, dataset, 1, done=2)


def test_processes_have_as_many_batches_where_they_do_not_come_out_even():
    """The first batches fill the last round up, as accelerate does without buckets."""
    one, other = batches_of(2, dataset_of("--train_batch_size", 3), 0)
    assert len(one) == len(other) == 2 and other[-1] == one[0]
    assert sorted(number for batch in (*one, other[0]) for number in batch) == [*range(5)]
    assert [len(own) for own in batches_of(5, dataset_of("--train_batch_size", 5, shapes=SHAPES[:1]), 0)] == [1] * 5


def test_training_in_buckets(tiny_sd1, bundle1, pictures, tmp_path, monkeypatch, caplog):  # noqa: F811
    """The UNet is given every picture in its shape; resumed in the middle of an epoch, the LoRA is the same."""
    given, forward = [], UNet2DConditionModel.forward

    def spying(unet, sample, *args, **kwargs):
        if unet.training:
            given.append(tuple(sample.shape))
        return forward(unet, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spying)
    flags = ("--enable_bucket", "--instance_data_dir", pictures, "--cache_latents", "--random_flip")
    flags += ("--max_train_steps", 8, "--checkpointing_steps", 6)
    with caplog.at_level(logging.INFO):
        whole = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert "Training on pictures of 3 sizes: 3 of 24 x 40, 1 of 32 x 32, 1 of 40 x 24 pixels." in caplog.text
    assert "Enlarged 1 of 5 pictures, which are smaller than they are trained at and gain no detail: 20 x 20" in (
        caplog.text
    )
    for epoch in (given[:4], given[4:]):
        assert sorted(epoch) == [(1, 4, 6, 10), (1, 4, 8, 8), (1, 4, 10, 6), (2, 4, 10, 6)]
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5
    again = train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--resume_from_checkpoint", "checkpoint-6")
    assert same(again, whole)


@pytest.mark.parametrize(
    ("resolution", "message"), [(36, "--resolution 36 is no multiple of 8"), (4, "--resolution 4 is too small for")]
)
def test_resolutions_that_do_not_fit(resolution, message, tiny_sd1, bundle1, pictures, tmp_path):  # noqa: F811
    flags = ("--enable_bucket", "--instance_data_dir", pictures, "--resolution", resolution)
    with pytest.raises(NullSpaceError, match=message):
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
