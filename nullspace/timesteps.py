"""Timesteps: the groups that a bundle splits them into."""

from nullspace.errors import NullSpaceError
from nullspace.names import JOINT


def timestep_groups(timesteps, count, num_train_timesteps=1000):
    """Split a sampler's timesteps into `count` groups of neighbours whose ranges tile the training timesteps.

    Args:
        timesteps (`Iterable[float]`): the timesteps that the sampler visits, in any order.
        count (`int`): number of groups; no more than there are different timesteps are made.

    Returns:
        `list[dict]`: `name`, `timesteps` (whole numbers, ascending) and `range` [first, last] of each group; a
        range ends half way to the next group's first timestep.
    """
    visited = sorted({round(float(timestep)) for timestep in timesteps})
    count = min(count, len(visited))
    bounds = [len(visited) * index // count for index in range(count + 1)]
    chunks = [visited[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    edges = [0] + [(left[-1] + right[0] + 1) // 2 for left, right in zip(chunks, chunks[1:], strict=False)]
    groups = []
    for chunk, first, last in zip(chunks, edges, edges[1:] + [num_train_timesteps], strict=True):
        name = JOINT if count == 1 else f"timesteps-{first:04d}-{last - 1:04d}"
        groups.append({"name": name, "timesteps": chunk, "range": [first, last - 1]})
    return groups


def joint_group(groups):
    """The group of all timesteps of the given ones."""
    return {
        "name": JOINT,
        "timesteps": sorted(timestep for group in groups for timestep in group["timesteps"]),
        "range": [min(group["range"][0] for group in groups), max(group["range"][1] for group in groups)],
    }


def split_groups(config):
    """The groups that a bundle splits its timesteps into: all but the joint one, or that one if it is alone."""
    return [group for group in config["groups"] if group["name"] != JOINT] or config["groups"]


def groups_inside(config, first, last):
    """The groups that a bundle splits its timesteps into which lie from `first` to `last`, both included.

    Raises:
        NullSpaceError: if there is none, or the range cuts through one.
    """
    kept = []
    for group in split_groups(config):
        inside = [first <= timestep <= last for timestep in group["timesteps"]]
        if any(inside) and not all(inside):
            raise NullSpaceError(
                f"The range {first} to {last} cuts through the group of timesteps {group['timesteps'][0]} to "
                f"{group['timesteps'][-1]}; choose another range, or build with --timestep_groups steps."
            )
        if all(inside):
            kept.append(group)
    if not kept:
        raise NullSpaceError(f"No timestep of the bundle lies between {first} and {last}.")
    return kept
