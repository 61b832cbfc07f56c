"""The names of the files that each adapter's `read_checkpoint` reads. Importing this module imports no framework."""

torch = ("pytorch_model.bin", "ckpt.pt")  # nanoGPT writes ckpt.pt
tensorflow = ("model.ckpt*.index",)
