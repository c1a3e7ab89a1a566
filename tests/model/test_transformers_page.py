"""The examples of transformers' page about Llama 4, on this package's classes and checkpoint: the calls are theirs.

What the page does with published checkpoints runs here with `tiny`, offline and on a CPU; pictures are drawn, not
fetched. Its quantized checkpoints need kernels of a GPU.
"""

import importlib.util
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Llama4Processor, pipeline

from llama4lab.checkpoint.locating import TINY
from llama4lab.model.llama4 import HookedLlama4
from llama4lab.prompt.checkpoint_prompter import load_image_processor
from llama4lab.tiny.drawing import draw_scene, picture

SETTINGS = {"device_map": "auto", "dtype": torch.bfloat16}
WHO = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def processor(tokenizer):
    """What `AutoProcessor` gives; it needs torchvision, where ours, of the same numbers, stands in."""
    if importlib.util.find_spec("torchvision"):
        return AutoProcessor.from_pretrained(TINY)
    return Llama4Processor(load_image_processor(TINY), tokenizer, patch_size=6, chat_template=tokenizer.chat_template)


@pytest.fixture(scope="module")
def model():
    return HookedLlama4.from_pretrained(TINY, **SETTINGS)


@torch.no_grad()
def by_full_passes(model, inputs, new: int) -> torch.Tensor:
    """The tokens of greedy decoding without a cache; rows that have ended are not looked at."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(new):
        pixels = {name: value for name, value in inputs.items() if name == "pixel_values"}
        logits = model(ids, attention_mask=mask, use_cache=False, **pixels).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.ones_like(ids)
    return ids[:, -new:]


def check_answer(model, inputs, outputs) -> None:
    """The generated tokens are those of full passes up to the first near tie, where bfloat16 may decide otherwise."""
    new = outputs[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] > 0
    assert torch.equal(new[:, :3], by_full_passes(model, inputs, new[:, :3].shape[1]))


def test_text_generation_by_a_pipeline(model, tokenizer):
    messages = [{"role": "user", "content": "what is the recipe of mayonnaise?"}]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    output = pipe(messages, do_sample=False, max_new_tokens=20)
    answer = output[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert answer["content"]


def test_a_chat_by_the_tokenizer(model, tokenizer):
    inputs = tokenizer.apply_chat_template(WHO, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    outputs = model.generate(**inputs.to(model.device), max_new_tokens=20)
    check_answer(model, inputs, outputs)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[-1] :])
    assert texts[0]


@pytest.mark.parametrize("count", [1, 2])
def test_a_chat_about_images_by_the_processor(count, model, processor, tmp_path):
    rng, parts = random.Random(0), []
    for number in range(count):
        picture(draw_scene(rng, 2)).save(tmp_path / f"{number}.png")
        parts.append({"type": "image", "url": str(tmp_path / f"{number}.png")})
    question = {"type": "text", "text": "What is in the top left?"}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, question]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    assert inputs["pixel_values"].shape[0] == count
    outputs = model.generate(**inputs, max_new_tokens=20)
    check_answer(model, inputs, outputs)
    assert processor.batch_decode(outputs[:, inputs["input_ids"].shape[-1] :])[0]


@pytest.mark.parametrize("options", [{"cache_implementation": "hybrid"}, {}, {"cache_implementation": "static"}])
def test_a_long_context_in_pieces(options, tokenizer):
    """In float32, where the tokens do not hang on rounding: as without pieces, whatever the cache."""
    model = HookedLlama4.from_pretrained(TINY, device_map="auto", dtype=torch.float32)
    text = " one two three four five six seven eight nine ten" * 30
    messages = [{"role": "user", "content": f"Look at the following texts: [{text}]\n\n\n\nWho wrote them?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert ids.shape[1] > 4 * 64
    once = model.generate(ids.to(model.device), max_new_tokens=12)
    out = model.generate(ids.to(model.device), prefill_chunk_size=100, max_new_tokens=12, **options)
    assert torch.equal(out, once)
    assert tokenizer.batch_decode(out[:, ids.shape[-1] :])[0]


@torch.no_grad()
@pytest.mark.parametrize("setting", ["eager", "sdpa", None])
def test_attention_is_set_when_the_model_is_loaded(setting, tokenizer):
    options = {} if setting is None else {"attn_implementation": setting}
    model = HookedLlama4.from_pretrained(TINY, device_map="auto", dtype=torch.float32, **options)
    assert model.config._attn_implementation == (setting or "sdpa")
    inputs = tokenizer.apply_chat_template(WHO, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = HookedLlama4.from_pretrained(TINY, dtype=torch.float32)
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=1e-4, rtol=0)


FLEX = """
import torch
from transformers import AutoTokenizer
from llama4lab.checkpoint.locating import TINY
from llama4lab.model.llama4 import HookedLlama4

torch.set_num_threads(1)
model = HookedLlama4.from_pretrained(TINY, attn_implementation="flex_attention", device_map="auto", dtype=torch.float32)
assert model.attn == "flex"
ids = AutoTokenizer.from_pretrained(TINY)("one two three four " * 20, return_tensors="pt")["input_ids"]
assert ids.shape[1] > 64  # a chunk
with torch.no_grad():
    found, expected = (m(ids).logits for m in (model, HookedLlama4.from_pretrained(TINY, dtype=torch.float32)))
print("equal" if (found - expected).abs().max() < 1e-4 else "other")
"""


def test_flex_attention_is_set_when_the_model_is_loaded(compiler):
    """In a process of its own, without run-time type checks, which the compiler would trace. In one pass: of the
    page's pieces and cache torch 2.13 makes C++ that does not compile.
    """
    result = subprocess.run([sys.executable, "-c", FLEX], capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().splitlines()[-1] == "equal"
