"""Long benchmarks that go on where they stopped: jobs in a process for each core, each one's result saved at once."""

import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed

import diffusers
import peft
import torch
import transformers
from tqdm.auto import tqdm


_subject = None  # of a worker process: what its jobs are done with


def start_worker(make):
    global _subject
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # jobs go side by side, one on each core
    _subject = make()


def work(do, job):
    return do(_subject, job)


def describe_machine():
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU, one thread a run",
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers, peft)},
    }


class Results:
    """What was measured so far, written after every job, so that the next start goes on from there.

    Args:
        path (`Path`): of the JSON file.
        make (`Callable`): called once in each worker process, gives what `do` gets beside each job.
        do (`Callable`): does a job, in a worker; gives what JSON can hold.
        workers (`int`): processes.
    """

    def __init__(self, path, make, do, workers):
        self.path, self.make, self.do, self.workers = path, make, do, workers
        self.content = json.loads(path.read_text()) if path.exists() else {}

    def save(self):
        partial = self.path.with_name(f"partial-{self.path.name}")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)

    def complete(self, section, jobs, description, fresh=False):
        """Do the jobs (`dict` by key) that a section lacks; return theirs of the section.

        Args:
            fresh (`bool`): whether each job has a process of its own.
        """
        done = self.content.setdefault(section, {})
        missing = {key: job for key, job in jobs.items() if key not in done}
        if missing:
            os.environ["OMP_NUM_THREADS"] = "1"  # read by the libraries as a worker starts
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                min(self.workers, len(missing)),
                spawn,
                start_worker,
                (self.make,),
                max_tasks_per_child=1 if fresh else None,
            ) as pool:
                running = {pool.submit(work, self.do, job): key for key, job in missing.items()}
                try:
                    for future in tqdm(as_completed(running), total=len(running), desc=description, unit="run"):
                        done[running[future]] = future.result()
                        self.save()
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # or it would go on with all that nobody would save
                    raise
        return {key: done[key] for key in jobs}
