"""What the adapters read and write, for the package's metadata. Importing this module imports no framework."""

# The names of the files that each adapter's `read_checkpoint` reads.
torch = ("pytorch_model.bin", "ckpt.pt")  # nanoGPT writes ckpt.pt
tensorflow = ("model.ckpt*.index",)

# The backend whose `write_graph` writes files with this suffix.
onnx = "ndonnx"
