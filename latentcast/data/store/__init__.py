"""What is kept on the disk for training: shards, the latents cache, prepared sets; made, checked, read."""
