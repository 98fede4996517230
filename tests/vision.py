"""Tiny random vision models of real classes, batches for them, and processors that need nothing from a hub."""

from __future__ import annotations

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers.feature_extraction_utils import BatchFeature

IMAGE, WORDS, TOKENS = 5, 97, 4  # the token that stands for a piece of an image, the vocabulary, such tokens an image
TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
QWEN_NEXT = QWEN | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
# Class, its configuration, and what beside the ids it is given: by row, by image or by patch.
MODELS: dict[str, tuple[str, dict, str]] = {
    "Llava": ("Llava", {"vision_config": VIT | {"model_type": "clip_vision_model", "patch_size": 4}}, "image"),
    "Gemma3": (
        "Gemma3",
        {"vision_config": VIT | {"patch_size": 2}, "mm_tokens_per_image": TOKENS,
         "text_config": TEXT | {"query_pre_attn_scalar": 8}},
        "image, types",
    ),
    "PaliGemma": (
        "PaliGemma",
        {"vision_config": VIT | {"model_type": "siglip_vision_model", "patch_size": 4}, "projection_dim": 32,
         "text_config": TEXT | {"model_type": "gemma"}},
        "image, prefix",
    ),
    "Idefics3": ("Idefics3", {"vision_config": VIT | {"patch_size": 2}}, "row"),
    "SmolVLM": ("SmolVLM", {"vision_config": VIT | {"patch_size": 2}}, "row"),
    "Qwen2-VL": (
        "Qwen2VL",
        {"vision_config": QWEN | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, "text_config": TEXT | MROPE},
        "patch",
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VL",
        {"vision_config": QWEN_NEXT | {"window_size": 16, "fullatt_block_indexes": [1]}, "text_config": TEXT | MROPE},
        "patch",
    ),
    "Qwen3-VL": (
        "Qwen3VL",
        {"vision_config": QWEN_NEXT | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
         "text_config": TEXT | MROPE},
        "patch",
    ),
}  # fmt: skip


def build(name: str, image_token: int = IMAGE) -> nn.Module:
    """A model whose logits are far from flat, and whose images matter."""
    kind, own, _ = MODELS[name]
    config = {
        "text_config": TEXT | {"model_type": "llama"},
        "image_token_id": image_token,
        "tie_word_embeddings": False,
    } | own
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(getattr(transformers, f"{kind}Config")(**config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.dim() > 1 else 0.05))
    return model.eval()


def batch(name: str) -> dict[str, Tensor]:
    """Two pairs, the first of two images and the second of one, with the pair_labels of their answers."""
    g = torch.Generator().manual_seed(1)
    counts, rows, labels = (2, 1), [], []
    for answer in (5, 3):
        for count in counts:
            said = torch.randint(10, WORDS, (3 + answer + count,), generator=g)
            prompt = torch.cat([torch.tensor([IMAGE] * TOKENS + [7])] * count + [said[:3]])
            rows.append(torch.cat((prompt, said[3:])))
            labels.append(torch.cat((torch.full((len(prompt) - 1,), -100), said[3:], torch.tensor([-100]))))
    for i in (0, 1):  # both answers are to the same prompt
        start = int((labels[i] != -100).nonzero()[0]) + 1
        rows[2 + i][:start] = rows[i][:start]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, pair_labels = pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    found = {"input_ids": ids, "attention_mask": mask, "pair_labels": pair_labels}
    images, what = 2 * sum(counts), MODELS[name][2]
    pixels = torch.randn(images, 3, 8, 8, generator=g)
    pixels[images // 2 :] = pixels[: images // 2]
    if what.startswith("image"):
        found["pixel_values"] = pixels
    elif what == "row":
        padded = torch.zeros(4, max(counts), 3, 8, 8)
        for row, own in enumerate(pixels.split([*counts, *counts])):
            padded[row, : len(own)] = own
        found["pixel_values"] = padded
        found["pixel_attention_mask"] = torch.ones(4, max(counts), 8, 8, dtype=torch.bool)
    else:
        found["pixel_values"] = torch.randn(images // 2, 16, 96, generator=g).repeat(2, 1, 1).view(-1, 96)
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * images)
        found["mm_token_type_ids"] = (ids == IMAGE).long()
    if what.endswith("types"):
        found["token_type_ids"] = (ids == IMAGE).long()
    if what.endswith("prefix"):  # what attends both ways; the answer is the rest
        found["token_type_ids"] = (pair_labels.roll(1, 1) != -100).long()
    return found


# Processors, by the model that they are for: what makes them of a tokenizer, and what stands for an image in a prompt.
SIZE = {"height": 8, "width": 8}
SPECIAL = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}


def llava(tokenizer):
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=SIZE)
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def gemma3(tokenizer):
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=SIZE), tokenizer, image_seq_length=TOKENS
    )


def idefics3(tokenizer):
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 8}, max_image_size={"longest_edge": 8}, do_image_splitting=False
    )
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=TOKENS)


class QwenProcessor(transformers.ProcessorMixin):
    """As Qwen's own, which has videos too and takes torchvision for them."""

    def __init__(self, tokenizer):
        self.tokenizer, self.chat_template = tokenizer, None
        self.images = transformers.Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 256, "longest_edge": 256})

    def __call__(self, images=None, text=None, return_tensors=None, **kwargs):
        found = {} if images is None else dict(self.images([one for row in images for one in row]))
        pieces = iter(found.get("image_grid_thw", ()))
        expanded = []
        for row in text:
            first, *rest = row.split("<image>")
            expanded.append(first + "".join("<image>" * (int(next(pieces).prod()) // 4) + part for part in rest))
        found |= self.tokenizer(expanded, **kwargs)
        place = self.tokenizer.convert_tokens_to_ids("<image>")
        found["mm_token_type_ids"] = [[int(token == place) for token in row] for row in found["input_ids"]]
        return BatchFeature(found, return_tensors)


PROCESSORS = {
    "Llava": (llava, "<image>"),
    "Gemma3": (gemma3, "<boi>"),
    "Idefics3": (idefics3, "<image>"),
    "Qwen2-VL": (QwenProcessor, "<image>"),
    "Qwen2.5-VL": (QwenProcessor, "<image>"),
}


def processor(name, tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny, extra_special_tokens=SPECIAL)
    return PROCESSORS[name][0](tokenizer)


def pairs(name, rows, count: int = 9):
    """A data set of ``rows`` about pictures: one, two or none each."""
    pil = __import__("PIL.Image").Image
    g = torch.Generator().manual_seed(2)
    place, found = PROCESSORS[name][1], []
    for i, row in enumerate(rows.select(range(count))):
        n = (1, 2, 0)[i % 3] if name != "Idefics3" else 1
        pixels = torch.randint(0, 256, (n, 8, 8, 3), generator=g, dtype=torch.uint8)
        images = [pil.fromarray(one.numpy()) for one in pixels]
        found.append(row | {"prompt": f"{place} sky " * n + row["prompt"], "images": images})
    return datasets.Dataset.from_list(found).cast_column("images", datasets.List(datasets.Image()))
