"""Neurons and losses alone, in a plain PyTorch loop: no configuration, no run folder, no command line.

    python examples/own_training_loop.py

trains a small spiking network on scikit-learn's digits in some 10 s and prints the test accuracy at T = 1 to 6.
Everything of tetdeploy in it is imported below: `LIF` maps currents [T, N, ...] to spikes, `total_loss` is Eq. 13.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tetdeploy.neurons import LIF
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--T", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    test, train = torch.randperm(len(images)).split([360, len(images) - 360])

    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for epoch in range(options.epochs):
        network.train()
        for batch in train[torch.randperm(len(train))].split(64):
            loss = total_loss(network(images[batch], options.T), labels[batch], lam=0.05, phi=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    network.eval()
    with torch.inference_mode():
        logits = network(images[test], 6)
    for T in range(1, 7):  # the mean of the first T steps is what a run of T steps answers
        accuracy = (logits[:T].mean(0).argmax(-1) == labels[test]).float().mean().item()
        print(f"T={T}: accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
