"""Whether a network of one's own can be exported, asked before a training that may take days.

A process of its own runs the network, in float64: what the user's code keeps outside of it, such as a table in a cache,
would reach the training otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from tetdeploy.data import Encoding
from tetdeploy.folding import FoldingError
from tetdeploy.networks import Classifier, NetworkConfig, import_network
from tetdeploy.tracing import Tracer

from .causality import check_on_noise, steps_to_check

_SECONDS = 300


@dataclass(frozen=True)
class Obstacle:
    """Why a network cannot be exported; with `of_folding` it can without folding BN."""

    reason: str
    of_folding: bool = False


def why_not(config: NetworkConfig, encoding: Encoding, T: int) -> Obstacle | None:
    """What stands against the export of a network of one's own, as far as a trace and two images of noise show that;
    None if they show nothing, or the process ended without an answer.

    Args:
        T: steps of the training; the network is run at more, see `steps_to_check`.
    """
    here = str(Path.cwd())  # which `import_network` adds; before the standard library's its files would be in the way
    paths = os.pathsep.join(path for path in sys.path if isinstance(path, str) and path not in ("", here))
    try:
        with TemporaryDirectory() as folder:  # the user's code may print, and leave processes that hold a pipe
            file = Path(folder) / "answer.json"
            file.write_text(json.dumps([asdict(config), encoding, T, sys.argv]))
            subprocess.run(
                [sys.executable, "-P", "-m", "tetdeploy.export.preflight", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
                check=True,
                env=os.environ | {"PYTHONPATH": paths},
            )
            answer = json.loads(file.read_text())
    except (OSError, subprocess.SubprocessError):
        return None
    return None if answer is None else Obstacle(**answer)


def _answer(config: NetworkConfig, encoding: Encoding, T: int) -> Obstacle | None:
    network = import_network(config)
    mean, std = (0.5,) * config.in_channels, (0.25,) * config.in_channels
    class_names = tuple(map(str, range(config.num_classes)))
    classifier = Classifier(network, config=config, mean=mean, std=std, class_names=class_names, encoding=encoding)
    try:
        check_on_noise(_told_apart(classifier.eval()), encoding, T=steps_to_check(T))
        Tracer(classifier, encoding=encoding, uint8=True).folded(3)
    except ValueError as error:
        return Obstacle(str(error), of_folding=isinstance(error, FoldingError))
    return None


def _told_apart(classifier: Classifier) -> Classifier:
    """BN layers scaled differently, as after a training: one for each step would compute the same until then."""
    for norm in classifier.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            norm.weight.data *= torch.rand_like(norm.weight) + 0.5
    return classifier


if __name__ == "__main__":
    file = Path(sys.argv[1])
    settings, encoding, T, sys.argv = json.loads(file.read_text())  # the user's module may read the command's words
    found = _answer(NetworkConfig(**settings), encoding, T)
    file.write_text(json.dumps(None if found is None else asdict(found)))
