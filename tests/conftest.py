"""A model small enough to train in a second, and pairs for it."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any test imports the kernels
    os.environ["TRITON_INTERPRET"] = "1"

# What `datasets` keeps on disk, of tests alone.
CACHE = tempfile.TemporaryDirectory(prefix="epsdpo-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name

WORDS = "the sky is blue green red and so are you my friend not what i said yes no maybe sure".split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama and a word-level tokenizer, and 48 pairs."""
    transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    g = torch.Generator().manual_seed(1)

    def words(n, last):
        picked = torch.randint(0, len(WORDS), (n,), generator=g).tolist()
        return " ".join([WORDS[i] for i in picked] + [last])

    lengths = torch.randint(1, 8, (48, 3), generator=g).tolist()
    rows = [{"prompt": words(a, "is"), "chosen": words(b, "yes"), "rejected": words(c, "no")} for a, b, c in lengths]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
