"""When a training's checkpoints are written: at the steps that it asks for, and at a signal, which ends it."""

from nullspace.checkpoint import how_to_go_on, save_checkpoint
from nullspace.divergence import check_weights
from nullspace.launch import PROCESS_TIMEOUT
from nullspace.signals import Agreement, Stopped


class Checkpointer:
    """Writes checkpoints, after a look at whether what they are to hold is finite.

    Args:
        parameters (`list[Tensor]`): all that are trained, of LoRA and word.
        scalars (`ScalarLog`): flushed first.
        run (`dict`): what the result depends on, see `describe_run`.
        saved (`int` or `None`): the step of the checkpoint that the training goes on from.

    Attributes:
        saved (`int` or `None`): the step of the last checkpoint.
    """

    def __init__(self, accelerator, parameters, scalars, run, saved, args):
        self.accelerator, self.parameters, self.scalars, self.run = accelerator, parameters, scalars, run
        self.saved, self.args = saved, args
        self.agreement = Agreement(accelerator.num_processes, PROCESS_TIMEOUT)

    def save(self, step):
        """Write the checkpoint of a step, and return its folder.

        Raises:
            DivergedError: if the training has diverged, with nothing written.
        """
        self.scalars.flush()
        check_weights(self.parameters, step, self.args)
        folder, self.saved = save_checkpoint(self.accelerator, step, self.args, self.run), step
        return folder

    def stop_if_asked(self, step):
        """End the run where a signal has come: at the same step in all processes, with a checkpoint of it.

        Raises:
            Stopped: if one has.
        """
        number = self.agreement.asked()
        if number:
            self.scalars.close()
            if self.saved != step:
                self.save(step)
            self.accelerator.end_training()
            raise Stopped(number, *how_to_go_on(self.args.output_dir, step))
