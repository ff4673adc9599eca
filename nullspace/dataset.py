"""The subject's pictures as a dataset: crops, mirroring and captions, drawn anew in each epoch."""

import math
import random
from itertools import cycle, islice

import torch
from accelerate import PartialState
from diffusers.image_processor import VaeImageProcessor
from PIL import ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from nullspace.buckets import nearest_size
from nullspace.pictures import fit, original_size
from nullspace.signals import leave_to_parent


def seeded(*parts):
    """A CPU generator seeded by all of the parts, so that what is drawn depends on nothing else.

    Every random choice in training has its own, named by the seed and the step: a resumed run then draws what an
    undisturbed one would have drawn, and no worker, process or device changes another's draws.
    """
    return torch.Generator().manual_seed(random.Random(repr(parts)).getrandbits(63))


class InstanceDataset(Dataset):
    """Pictures (3, height, width) in [-1, 1], the numbers of their captions, and their framings (6,).

    A framing is, in pixels: height and width of the picture as its file has it, top and left of the crop once it is
    resized (and mirrored), height and width of the crop.

    Crops, unless they are centred, mirroring and one of several captions are drawn anew in each epoch, for each of the
    repeats.

    Args:
        pictures (`list[Image]`): the pictures.
        captions (`list[list[int]]`): for each, the numbers of its captions.
        args: the flags on pictures, and the seed.
        sizes (`list[tuple[int, int]]`, *optional*): (width, height) to be trained at, of which each picture has the one
            that shows most of it (default: square, of --resolution).
    """

    def __init__(self, pictures, captions, args, sizes=None):
        self.pictures, self.captions, self.args = [], captions, args
        sizes = sizes or [(args.resolution, args.resolution)]
        self.originals = [original_size(picture) for picture in pictures]
        self.sizes = [nearest_size(original, sizes) for original in self.originals]  # each picture's own
        for picture in pictures:
            self.pictures.append(fit(picture, sizes, args.image_interpolation_mode))
        self.epoch = 0
        self.cached = None
        self.processor = VaeImageProcessor(do_resize=False)

    def set_epoch(self, epoch):
        """Draw what this epoch (`int`) has: crops, mirroring, captions."""
        self.epoch = epoch

    def __len__(self):
        return len(self.pictures) * self.args.repeats

    def __getitem__(self, index):
        number = index % len(self.pictures)
        flip = self.args.random_flip and torch.rand(1, generator=self._generator("flip", index)).item() < 0.5
        captions = self.captions[number]
        caption = captions[torch.randint(len(captions), (), generator=self._generator("caption", index))]
        picture, framing = self.picture(index, flip) if self.cached is None else self.cached[number][flip]
        return picture, caption, framing

    def _generator(self, what, index):
        return seeded(self.args.seed, what, self.epoch, index)

    def picture(self, index, flip):
        """A picture as it is trained on, and its framing."""
        number = index % len(self.pictures)
        picture, (width, height) = self.pictures[number], self.sizes[number]
        slack = torch.tensor(picture.size) - torch.tensor([width, height])
        if self.args.center_crop:
            left, top = (slack // 2).tolist()
        else:
            left, top = (torch.rand(2, generator=self._generator("crop", index)) * (slack + 1)).long().tolist()
        cropped = picture.crop((left, top, left + width, top + height))
        if flip:
            cropped, left = ImageOps.mirror(cropped), slack[0].item() - left
        original_width, original_height = self.originals[number]
        framing = torch.tensor([original_height, original_width, top, left, height, width], dtype=torch.float32)
        return self.processor.preprocess(cropped)[0], framing

    def first_epoch(self):
        """Each of the pictures (3, height, width) once, as the first epoch has it but for mirroring."""
        return (self.picture(number, False)[0] for number in range(len(self.pictures)))

    def cache(self, encode):
        """From now on give what `encode` makes of each picture (1, 3, height, width) in its place, crops fixed."""
        flips = (False, True) if self.args.random_flip else (False,)
        disable = not PartialState().is_local_main_process
        numbers = tqdm(range(len(self.pictures)), desc="Caching latents", unit="picture", disable=disable)
        framed = ([self.picture(number, flip) for flip in flips] for number in numbers)
        self.cached = [[(encode(picture[None])[0].cpu(), framing) for picture, framing in each] for each in framed]


class BucketBatches(Sampler):
    """Batches of pictures of one size, by their numbers: each picture once an epoch, in an order of its own.

    That depends on the seed and the dataset's epoch alone, so that it is the same in all processes, among which
    accelerate deals the batches out. A size's last batch may be smaller; the first ones come again at the end, as many
    as give each process equally many.
    """

    batch_size = None  # of whatever length, says this to accelerate

    def __init__(self, dataset, processes, args):
        self.dataset, self.processes, self.args, self.of_size = dataset, processes, args, {}
        for index in range(len(dataset)):
            self.of_size.setdefault(dataset.sizes[index % len(dataset.sizes)], []).append(index)

    def __len__(self):
        count = sum(math.ceil(len(indices) / self.args.train_batch_size) for indices in self.of_size.values())
        return math.ceil(count / self.processes) * self.processes

    def __iter__(self):
        generator = seeded(self.args.seed, "batches", self.dataset.epoch)
        batches = []
        for indices in self.of_size.values():
            shuffled = torch.tensor(indices)[torch.randperm(len(indices), generator=generator)]
            batches += [batch.tolist() for batch in shuffled.split(self.args.train_batch_size)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        yield from (batches[number] for number in islice(cycle(order), len(self)))


def make_dataloader(dataset, processes, args):
    """Batches of --train_batch_size for so many processes, shuffled, loaded by --dataloader_num_workers."""
    batches = {"batch_size": args.train_batch_size, "shuffle": True}
    if args.enable_bucket:
        batches = {"batch_sampler": BucketBatches(dataset, processes, args)}
    workers = 0 if args.cache_latents else args.dataloader_num_workers  # which start anew each epoch: of what is there
    return DataLoader(dataset, **batches, num_workers=workers, worker_init_fn=leave_to_parent)


def epoch_batches(accelerator, dataset, dataloader, epoch, done):
    """The batches of an epoch, without the first `done` of them, from a dataloader that accelerate has prepared."""
    dataset.set_epoch(epoch)
    dataloader.set_epoch(epoch)
    batches = accelerator.skip_first_batches(dataloader, done) if done else dataloader
    batches.set_epoch(epoch)  # before accelerate 1.15 what skips batches begins at epoch 0 again
    return batches
