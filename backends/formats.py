"""Which files an adapter's `read_checkpoint` reads, by their names; whoever asks imports no framework to know it."""

torch = ("pytorch_model.bin",)
tensorflow = ("model.ckpt*.index",)
