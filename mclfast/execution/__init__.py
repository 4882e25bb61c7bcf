"""How a training step runs the peers: memory modes, offload, layout, CUDA graphs."""
