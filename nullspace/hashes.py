"""Hex digests of files and of what is written as JSON."""

import hashlib
import json


def sha256(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def config_sha256(config):
    """Hex digest of what a configuration says, all but this digest itself."""
    return hash_json({key: value for key, value in config.items() if key != "sha256"})


def hash_json(content):
    """Hex digest of what can be written as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
