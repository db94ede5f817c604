"""The mathematics of the diffusion model, on tensors. Knows nothing of files, stages or run folders.

Images here are float32, [n, channels, height, width], in [-1, 1].
"""
