"""Neurons and losses in a plain PyTorch loop of your own, which ends with a checkpoint. From this folder:

    python own_training_loop.py
    tetdeploy export runs/own-loop --model own_training_loop:my_network --T 6
    tetdeploy sweep runs/own-loop/model-T6.onnx

The loop trains a small spiking network on the digits in some 10 s and prints the test accuracy at T = 1 to 6. (Beside
other work set GOMP_SPINCOUNT=1000: docs/training.md, On a CPU.)
Everything of tetdeploy in it is imported below: `LIF` maps currents [T, N, ...] to spikes, `total_loss` is Eq. 13 (any
loss of logits [T, N, K] may take its place); a `Classifier` adds to the network what its data need, and
`save_checkpoint` writes what the commands read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from tetdeploy.checkpoint import save_checkpoint
from tetdeploy.data import load_data
from tetdeploy.networks import Classifier, NetworkConfig
from tetdeploy.neurons import LIF
from tetdeploy.storage.provenance import written
from tetdeploy.train import total_loss


class Network(nn.Module):
    """Two hidden layers of LIF neurons and an output that only integrates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.lif1 = LIF(tau=0.5, v_th=1.0, gamma=1.0)
        self.hidden, self.bn = nn.Linear(24 * 8 * 8, 128), nn.BatchNorm1d(128)
        self.lif2 = LIF()
        self.readout = nn.Linear(128, 10)

    def forward(self, images: Tensor, T: int) -> Tensor:
        current = self.stem(images)  # the image does not change with time, so neither does its current
        spikes = self.lif1(current.expand(T, *current.shape))
        current = self.bn(self.hidden(spikes.flatten(2).flatten(0, 1)))  # statistics over time and batch together
        spikes = self.lif2(current.unflatten(0, (T, -1)))
        logits: Tensor = self.readout(spikes)  # [T, N, 10]: linear layers take time as one more batch axis
        return logits


def my_network(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """What `--model own_training_loop:my_network` calls; this network is for the digits alone."""
    return Network()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/own-loop"))
    options = parser.parse_args()
    if options.epochs < 1 or options.T < 1:
        parser.error("--epochs and --T must be at least 1")

    torch.manual_seed(0)
    train, test = (load_data("digits", part) for part in ("train", "test"))
    images, labels = torch.tensor(train.x), torch.tensor(train.labels)  # uint8, which the classifier normalises
    config = NetworkConfig("own_training_loop:my_network", len(train.class_names), in_channels=1, image_size=(8, 8))
    network = Classifier(
        Network(),
        config=config,
        mean=train.mean,
        std=train.std,
        class_names=train.class_names,
        data=train.name,
        encoding=train.encoding,
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for epoch in range(options.epochs):
        network.train()
        for batch in torch.randperm(len(images)).split(64):
            loss = total_loss(network(images[batch], options.T), labels[batch], lam=0.05, phi=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    network.eval()
    with torch.inference_mode():
        logits = network(torch.tensor(test.x), 6)
    for T in range(1, 7):  # the mean of the first T steps is what a run of T steps answers
        accuracy = (logits[:T].mean(0).argmax(-1) == torch.tensor(test.labels)).float().mean().item()
        print(f"T={T}: accuracy {accuracy:.1%}")
    file = options.out / "checkpoint.safetensors"
    training, provenance = {"T": options.T, "epochs": options.epochs}, {"device": "cpu"}
    save_checkpoint(file, network, training=training, provenance=provenance | written(torch=torch.__version__))
    print(file)


if __name__ == "__main__":
    main()
