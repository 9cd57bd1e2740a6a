"""The parts of the name table that the architectures share. Source: Baidu's released model code, run beside it.

H hidden, Q heads x head_dim, KV kv_heads x head_dim, I dense FFN, M expert FFN, MS shared experts, E experts, V vocabulary.
Paddle linears are [in, out], PT linears [out, in]; the shapes are PT's.
"""

from __future__ import annotations

from ernie_quant.names import ATTENTION, COPY, EMBED, EXPERT, HEAD, IN, MLP, MTP, NORM, OUT, ROUTER, SHARED, TRANSPOSE, Op, Rule

QKV, QKV_BIAS = Op(True, ("Q", "KV", "KV")), Op(False, ("Q", "KV", "KV"))


def block(paddle: str, role: str | None = None) -> tuple[Rule, ...]:
    """Attention and norms of the decoder block `paddle`, such as `ernie.layers.{layer}`."""
    p = paddle.replace("ernie.", "model.", 1)
    a, pa, qkv = f"{paddle}.self_attn", f"{p}.self_attn", (("Q", "H"), ("KV", "H"), ("KV", "H"))
    at, no = role or ATTENTION, role or NORM
    # fmt: off
    return (
        Rule(f"{a}.qkv_proj.weight",                       QKV,       tuple(f"{pa}.{x}_proj.weight" for x in "qkv"), qkv, at, OUT),
        Rule(f"{a}.qkv_proj.bias",                         QKV_BIAS,  tuple(f"{pa}.{x}_proj.bias" for x in "qkv"), (("Q",), ("KV",), ("KV",)), at, OUT, "use_bias"),
        Rule(f"{a}.o_proj.weight",                         TRANSPOSE, (f"{pa}.o_proj.weight",), ("H", "Q"), at, IN),
        Rule(f"{a}.o_proj.bias",                           COPY,      (f"{pa}.o_proj.bias",), ("H",), at, None, "use_bias"),
        Rule(f"{paddle}.input_layernorm.weight",           COPY,      (f"{p}.input_layernorm.weight",), ("H",), no),
        Rule(f"{paddle}.post_attention_layernorm.weight",  COPY,      (f"{p}.post_attention_layernorm.weight",), ("H",), no),
    )
    # fmt: on


def ffn(paddle: str, width: str, role: str) -> tuple[Rule, ...]:
    """The gated FFN `paddle` of inner width `width`, such as `ernie.layers.{moe}.mlp.experts.{expert}`."""
    p = paddle.replace("ernie.", "model.", 1)
    # fmt: off
    return (
        # up_gate_proj holds gate first, then up, despite its name
        Rule(f"{paddle}.up_gate_proj.weight", Op(True, (width, width)),  (f"{p}.gate_proj.weight", f"{p}.up_proj.weight"), (width, "H"), role, OUT),
        Rule(f"{paddle}.up_gate_proj.bias",   Op(False, (width, width)), (f"{p}.gate_proj.bias", f"{p}.up_proj.bias"), (width,), role, OUT, "use_bias"),
        Rule(f"{paddle}.down_proj.weight",    TRANSPOSE,                 (f"{p}.down_proj.weight",), ("H", width), role, IN),
        Rule(f"{paddle}.down_proj.bias",      COPY,                      (f"{p}.down_proj.bias",), ("H",), role, None, "use_bias"),
    )
    # fmt: on


# fmt: off
MODEL = (
    Rule("ernie.embed_tokens.weight", COPY, ("model.embed_tokens.weight",), ("V", "H"), EMBED, OUT),
    *block("ernie.layers.{layer}"),
    *ffn("ernie.layers.{dense}.mlp", "I", MLP),
    Rule("ernie.norm.weight",         COPY, ("model.norm.weight",), ("H",), NORM),
    Rule("lm_head.bias",              COPY, ("lm_head.bias",), ("V",), HEAD, OUT, "never"),
)
# a tied head is stored as the embedding is, if at all; an untied one as a linear
TIED_HEAD = Rule("lm_head.weight",   COPY,      ("lm_head.weight",), ("V", "H"), HEAD, OUT, "never")
UNTIED_HEAD = Rule("lm_head.weight", TRANSPOSE, ("lm_head.weight",), ("V", "H"), HEAD, OUT)

TEXT_EXPERTS = (
    Rule("ernie.layers.{moe}.mlp.gate.weight", TRANSPOSE, ("model.layers.{moe}.mlp.gate.weight",), ("E", "H"), ROUTER),
    Rule("ernie.layers.{moe}.mlp.moe_statics.e_score_correction_bias", COPY, ("model.layers.{moe}.mlp.moe_statics.e_score_correction_bias",), ("1", "E"), ROUTER, None, "routing_bias"),
    *ffn("ernie.layers.{moe}.mlp.experts.{expert}", "M", EXPERT),
    *ffn("ernie.layers.{shared}.mlp.shared_experts", "MS", SHARED),
)
MTP_BLOCK = (
    *block("ernie.mtp_block.{mtp}", MTP),
    *ffn("ernie.mtp_block.{mtp}.mlp", "I", MTP),
    Rule("ernie.mtp_emb_norm.{mtp}.weight",    COPY,      ("model.mtp_emb_norm.{mtp}.weight",), ("H",), MTP),
    Rule("ernie.mtp_hidden_norm.{mtp}.weight", COPY,      ("model.mtp_hidden_norm.{mtp}.weight",), ("H",), MTP),
    Rule("ernie.mtp_linear_proj.{mtp}.weight", TRANSPOSE, ("model.mtp_linear_proj.{mtp}.weight",), ("H", "2H"), MTP, OUT),
)
# fmt: on
