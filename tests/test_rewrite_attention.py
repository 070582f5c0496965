"""The pass that makes attention distributed and cached."""

# ruff: noqa: E501 (snapshots)

import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, parsed, text, transformed

from piflux.passes.split.layout import layout
from piflux.passes.split.rewrite_attention import rewrite_attention

PASSES = (layout, rewrite_attention)


def model(text, image):
    q = torch.cat([text, image], 1)[:, None]
    out = F.scaled_dot_product_attention(q, q, q, scale=0.5)
    return out[:, 0, text.shape[1] :]


class TestRewriteAttention(TestCase):
    def test_static(self):
        gm = capture(model, torch.randn(1, 4, 8), torch.randn(1, 6, 8))
        transformed(gm, passes=PASSES)
        self.assertExpectedInline(
            text(gm),
            """\
text: (1, 4, 8)
image: (1, 6, 8)
cat: (1, 10, 8) = cat([text, image], 1)
q: (1, 1, 10, 8) = getitem(cat, (:, None))
out: (1, 1, 10, 8) = piflux.cached_sdpa(q, q, q, None, 0.5, False, [4, 6], 0, 2)
getitem_1: (1, 6, 8) = getitem(out, (:, 0, 4:))
return (getitem_1,)
""",
        )

    def test_dynamic(self):
        gm = capture(model, torch.randn(1, 4, 8), torch.randn(1, 6, 8), dynamic=True)
        transformed(gm, passes=PASSES)
        self.assertExpectedInline(
            text(gm),
            """\
s12: s12
s7: s7
text: (1, s12, s7)
s62: s62
image: (1, s62, s7)
cat: (1, s12 + s62, s7) = cat([text, image], 1)
q: (1, 1, s12 + s62, s7) = getitem(cat, (:, None))
out: (1, 1, s12 + s62, s7) = piflux.cached_sdpa(q, q, q, None, 0.5, False, [s12, s62], 0, 2)
getitem_4: (1, s62, s7) = getitem(out, (:, 0, s12:))
return (getitem_4,)
""",
        )

    def test_a_mask_goes_along(self):
        gm = parsed(
            """
x: (1, 6, 8)
mask: (6, 6)
q: (1, 1, 6, 8) = getitem(x, (:, None))
scaled_dot_product_attention: (1, 1, 6, 8) = scaled_dot_product_attention(q, q, q, mask)
return (scaled_dot_product_attention,)
""",
            mask=torch.bool,
        )
        transformed(gm, passes=PASSES)
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 8)
mask: (6, 6)
q: (1, 1, 6, 8) = getitem(x, (:, None))
scaled_dot_product_attention: (1, 1, 6, 8) = piflux.cached_sdpa(q, q, q, mask, None, False, [6], 0, 2)
return (scaled_dot_product_attention,)
""",
        )

    def test_attention_to_conditions_is_no_match(self):
        """Their keys and values are whole on every rank, so plain attention is exact."""
        gm = parsed(
            """
x: (1, 6, 8)
prompt: (1, 5, 8)
q: (1, 1, 6, 8) = getitem(x, (:, None))
c: (1, 1, 5, 8) = getitem(prompt, (:, None))
own: (1, 1, 6, 8) = scaled_dot_product_attention(q, q, q)
to_prompt: (1, 1, 6, 8) = scaled_dot_product_attention(own, c, c)
return (to_prompt,)
"""
        )
        transformed(gm, passes=PASSES)
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 8)
prompt: (1, 5, 8)
q: (1, 1, 6, 8) = getitem(x, (:, None))
c: (1, 1, 5, 8) = getitem(prompt, (:, None))
own: (1, 1, 6, 8) = piflux.cached_sdpa(q, q, q, None, None, False, [6], 0, 2)
to_prompt: (1, 1, 6, 8) = scaled_dot_product_attention(own, c, c)
return (to_prompt,)
""",
        )
