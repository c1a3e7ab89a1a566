"""torch.compile of the plain forward pass."""

PROGRAM = """
compiled = torch.compile(model)
with torch.no_grad():
    for length in (20, 20):
        ids = torch.randint(1, 64, (2, length))
        difference = (compiled(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max()
        assert difference < 1e-4, difference
    ids[1, :5] = 0
    mask = (ids != 0).long()
    kept = mask.bool()
    one, other = (m(ids, attention_mask=mask, use_cache=False).logits[kept] for m in (compiled, model))
    assert (one - other).abs().max() < 1e-4, "padded"
print("equal")
"""


def test_the_compiled_forward_gives_the_logits_of_the_plain_one(printed_with_small_model):
    assert printed_with_small_model(PROGRAM) == "equal"
