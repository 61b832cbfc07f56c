"""Which files an adapter's `read_checkpoint` reads, by their names; whoever asks imports no framework to know it."""

torch = ("pytorch_model.bin", "ckpt.pt")  # the second is nanoGPT's
tensorflow = ("model.ckpt*.index",)
