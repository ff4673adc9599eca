"""Publishing a bundle: as a dataset on the Hub, whose card names its own repository."""

import json
import re
import shlex
import sys
from pathlib import Path

from nullspace.bundle import check_files, group_file, read_config
from nullspace.dataset_card import THIS_REPOSITORY, model_name
from nullspace.errors import NullSpaceError
from nullspace.hashes import config_sha256, sha256
from nullspace.hub import create_repository, hub_repository, linked, push_folder
from nullspace.names import CARD_NAME, CONFIG_NAME
from nullspace.system import write_text


# A card's flag with the repository in it, under its name in older cards too
NAMED_IN_CARD = re.compile(r"(--nullspace(?:_name_or_path)? )(.+)( \\\n)")


def find_repository(args):
    """The repository to push to before a bundle is built, so that nothing is in the way of it then: its id.

    Raises:
        NullSpaceError: if nobody is logged in who may write there, or it cannot be created.
    """
    repo_id = hub_repository(args.hub_dataset_id, args.output_dir, "dataset", args.hub_token)
    create_repository(repo_id, "dataset", args.hub_private_repo, args.hub_token)
    return repo_id


def publish(args):
    """Upload the bundle that lies in --output_dir; a sentence says where it is then.

    Raises:
        NullSpaceError: if there is none, it is not whole, it was pushed to another repository before, or that fails.
    """
    folder = args.output_dir
    if not (folder / CONFIG_NAME).is_file():
        raise NullSpaceError(f"{folder} holds no bundle; build one with --pretrained_model_name_or_path.")
    check_no_links(folder)
    check_files(folder)
    retry = f"push it with: {push_command(args.hub_dataset_id, args)}"
    repo_id = hub_repository(args.hub_dataset_id, folder, "dataset", args.hub_token, retry)
    if args.hub_dataset_id is None and published_as(folder) not in (None, repo_id):
        raise NullSpaceError(
            f"{folder} was pushed to {published_as(folder)} and would now go to {repo_id}: say to which with "
            "--hub_dataset_id."
        )
    create_repository(repo_id, "dataset", args.hub_private_repo, args.hub_token, retry)
    return push(repo_id, args)


def push(repo_id, args):
    """Upload the bundle in --output_dir to a repository in one commit; a sentence says where it is then.

    Raises:
        NullSpaceError: if that fails, with the command that tries again.
    """
    config = name_repository(repo_id, args.output_dir)
    return push_folder(
        repo_id,
        "dataset",
        args.output_dir,
        [CONFIG_NAME, *config["files"]],
        f"Null-space bundle of {model_name(config)}: {config['prompts']['count']:,} prompts, "
        f"{config['sampler']}, format {config['format_version']}",
        push_command(repo_id, args),
        args.hub_token,
        outdated=group_file("timesteps-*"),  # of an earlier bundle, which may have had other groups
    )


def push_command(repo_id, args):
    """The command that pushes the bundle in --output_dir later."""
    script = Path(sys.argv[0]).name
    words = ["python"] * script.endswith(".py") + [script, "--output_dir", str(args.output_dir), "--push_to_hub"]
    words += ["--hub_dataset_id", repo_id] if repo_id else []
    return shlex.join(words + ["--hub_private_repo"] * args.hub_private_repo)


def check_no_links(folder):
    """Raise `NullSpaceError` if one of the files that a bundle's configuration lists, all plain names, is a link."""
    for name in read_config(folder)["files"]:
        if linked(folder, name):
            raise NullSpaceError(
                f"{folder / name} is a link, which is not published: copy the bundle as files, with cp -rL, and name "
                "the copy with --output_dir."
            )


def name_repository(repo_id, folder):
    """Write the repository's id into the card's command, and record the card as it is now: the configuration."""
    config, card = read_config(folder), folder / CARD_NAME
    if card.is_file():  # a bundle that was merged has none
        text = card.read_text(encoding="utf-8")
        write_text(card, NAMED_IN_CARD.sub(rf"\g<1>{repo_id}\g<3>", text, count=1))
        config["files"][CARD_NAME] = sha256(card)
        config["sha256"] = config_sha256(config)
        write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    return config


def published_as(folder):
    """The repository that a bundle's card names, or None: where it was pushed to before."""
    card = folder / CARD_NAME
    named = card.is_file() and NAMED_IN_CARD.search(card.read_text(encoding="utf-8"))
    return named[2] if named and named[2] != THIS_REPOSITORY else None
