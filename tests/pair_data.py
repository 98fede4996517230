"""Pairs, files of them, and tokenizers that spell every byte: what the tests of the data share."""

import gzip
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train.data import load_pairs

TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template=None, bos=False, eos="<|end|>"):
    """One token a byte, plus <|start|>, <|end|> and <bos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token=eos, pad_token="<pad>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = template
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    return tokenizer


PLAIN, CHAT = byte_tokenizer(), byte_tokenizer(TEMPLATE)


def write(path, *rows):
    """JSON lines; bytes are written as they are."""
    data = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def pair(prompt="Q: ", chosen="yes", rejected="no", **labels):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **labels}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def decoded(row, tokenizer=PLAIN):
    return [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


def load(path, *rows, tokenizer=PLAIN, **options):
    return load_pairs(write(path / "data.jsonl", *rows), tokenizer, **options)


def load_one(path, row, tokenizer=PLAIN, **options):
    return load(path, row, tokenizer=tokenizer, **options)[0][0]


def drops(path, *rows, tokenizer=PLAIN, **options):
    """Where rows were dropped, by reason."""
    report = load(path, *rows, tokenizer=tokenizer, **options)[1]
    assert report.read == report.kept + sum(report.dropped.values()) == sum(row != b"" for row in rows)
    return report.where
