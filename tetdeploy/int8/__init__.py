"""Networks in 8-bit integers with exact spikes, in PyTorch: the arithmetic, scales found on images, the network."""
