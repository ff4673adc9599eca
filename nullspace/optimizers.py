"""The optimizer and the schedule of its learning rate."""

import math

import torch
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler

from nullspace.captions import counted
from nullspace.names import TEXT_ENCODERS


logger = get_logger(__name__)
FEW = 50  # steps that teach nothing


def parameter_groups(adapted, word, args):
    """What is trained, by how fast, as optimizers take it: LoRA layers of models (`dict`) and the `NewWord`, if any.

    The rows of a word have no weight decay, which would draw them to a row that means nothing.
    """
    by_rate, rows = {}, [] if word is None else list(word.rows.values())
    own = set(rows)
    for name, model in adapted.items():
        own_rate = args.text_encoder_lr if name in TEXT_ENCODERS else None
        rate = args.learning_rate if own_rate is None else own_rate
        by_rate.setdefault(rate, []).extend(
            each for each in model.parameters() if each.requires_grad and each not in own
        )
    groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    if rows:
        groups.append({"params": rows, "lr": args.word_learning_rate, "weight_decay": 0.0})
    return groups


def make_optimizer(parameters, args):
    """The optimizer of --optimizer, with its settings, for parameters or groups of them."""
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, **settings, use_bias_correction=True, safeguard_warmup=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)


def make_schedule(optimizer, dataloader, accelerator, args):
    """The learning rate's schedule, and the optimizer steps of an epoch; settles --max_train_steps and the epochs."""
    batches = math.ceil(len(dataloader) / accelerator.num_processes)
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
        if args.max_train_steps < FEW:
            logger.warning(
                f"--num_train_epochs {args.num_train_epochs} is {counted(args.max_train_steps, 'step')} here; "
                "--max_train_steps 800 is usual."
            )
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        # accelerate advances the schedule once for each process
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    return schedule, steps_per_epoch
