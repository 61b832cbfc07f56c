"""Write checkpoints in every layout that can be read, as other programs write them, without this package's writer."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def hugging_face_names(arrays, prefix="transformer."):
    """Return arrays by Hugging Face's names. The last part of a path determines the last part of the name."""
    leaves = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}

    def name(path):
        if path == "lm_head":
            return "lm_head.weight"
        *scopes, leaf = path.split("/")
        if scopes and scopes[0][1:].isdigit():
            scopes[:1] = ["h", scopes[0][1:]]
        return prefix + ".".join([*scopes, leaves.get(leaf, leaf)])

    return {name(path): a for path, a in arrays.items()}


def write_config(directory, config):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))


def write_safetensors(directory, config, arrays):
    """Write a single safetensors file."""
    write_config(directory, config)
    save_file(hugging_face_names(arrays), directory / "model.safetensors")


def split(arrays, n):
    """Return the arrays of n files, by the numbers that transformers puts into the files' names."""
    parts = [dict(list(arrays.items())[i::n]) for i in range(n)]
    return {f"-{i:05}-of-{n:05}": part for i, part in enumerate(parts, 1)}


def write_index(directory, stem, suffix, shards):
    weight_map = {name: f"{stem}{number}{suffix}" for number, part in shards.items() for name in part}
    entries = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(entries))


def write_sharded_safetensors(directory, config, arrays, n=3):
    """Write several safetensors files and their index."""
    write_config(directory, config)
    shards = split(hugging_face_names(arrays), n)
    write_index(directory, "model", ".safetensors", shards)
    for number, part in shards.items():
        save_file(part, directory / f"model{number}.safetensors")


def write_bin(directory, config, arrays, *, is_zip=True, n=1):
    """Write pytorch_model.bin, as a zip file or in the format of PyTorch before 1.6; or n files and their index."""
    import torch

    write_config(directory, config)
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in hugging_face_names(arrays).items()}
    if n > 1:
        write_index(directory, "pytorch_model", ".bin", split(tensors, n))
    for number, part in split(tensors, n).items() if n > 1 else [("", tensors)]:
        torch.save(part, directory / f"pytorch_model{number}.bin", _use_new_zipfile_serialization=is_zip)


def nanogpt(config, arrays, *, bias=True, prefix="_orig_mod."):
    """Return the state that nanoGPT's train.py saves. Weights are transposed as in nn.Linear, and lm_head is wte."""
    import torch

    tensors = {
        prefix + name: torch.from_numpy(np.array(a.T if path.endswith("/w") else a))
        for (path, a), name in zip(arrays.items(), hugging_face_names(arrays), strict=True)
        if bias or not path.endswith("/b")
    }
    if f"{prefix}transformer.wte.weight" in tensors:
        tensors[f"{prefix}lm_head.weight"] = tensors[f"{prefix}transformer.wte.weight"]
    args = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "block_size": config.n_ctx}
    return {
        "model": tensors,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{}]},
        "model_args": {**args, "bias": bias, "vocab_size": config.n_vocab, "dropout": 0.1},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.47),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True},
    }


def write_nanogpt(directory, config, arrays):
    """Write ckpt.pt, which is the only file that nanoGPT writes."""
    import torch

    directory.mkdir(exist_ok=True)
    torch.save(nanogpt(config, arrays), directory / "ckpt.pt")


def write_training_state(directory, config, arrays):
    """Write the state of a trainer whose model was compiled, and wrapped for data-parallel training."""
    import torch

    write_config(directory, config)
    tensors = hugging_face_names(arrays, "_orig_mod.module.transformer.")
    state = {"epoch": 3, "state_dict": {name: torch.from_numpy(np.array(a)) for name, a in tensors.items()}}
    torch.save(state, directory / "pytorch_model.bin")


def write_openai(directory, config, arrays):
    """Write a checkpoint like OpenAI's release: with the Saver of TensorFlow 1, and conv1d weights [1, nx, nf]."""
    import tensorflow as tf

    directory.mkdir(exist_ok=True)
    hparams = {name: getattr(config, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    (directory / "hparams.json").write_text(json.dumps(hparams))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for path, a in arrays.items():
            tf.compat.v1.get_variable(f"model/{path}", initializer=a[None] if path.endswith("/w") else a)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(directory / "model.ckpt"))
    (directory / "checkpoint").write_text(
        'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    )


def write_openai_tokenizer(directory, files):
    """Copy vocab.json and merges.txt into a directory, under OpenAI's names."""
    for name, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        Path(directory, theirs).write_bytes(Path(files, name).read_bytes())


WRITERS = {  # for each layout: the backend whose framework is needed, and the function
    "safetensors": (None, write_safetensors),
    "safetensors in 3 files": (None, write_sharded_safetensors),
    "bin": ("torch", write_bin),
    "bin of old": ("torch", lambda *args: write_bin(*args, is_zip=False)),
    "bin in 2 files": ("torch", lambda *args: write_bin(*args, n=2)),
    "training state": ("torch", write_training_state),
    "nanoGPT": ("torch", write_nanogpt),
    "OpenAI": ("tensorflow", write_openai),
}
