"""Logits of a whole model whose context YaRN extends, against Hugging Face's DeepSeek-V3."""

import dataclasses

import jax
import numpy as np

from engram_jax.layers.rope import frequencies
from tests.model.test_transformer import full
from tests.tiny import tiny

LENGTH = 160  # of tokens; 64 of them are the original length

CONFIG = {
    "model.d_model": 32,
    "model.layers": 2,
    "model.tie_embeddings": False,
    "model.attention.heads": 4,
    "model.attention.kv_lora_rank": 16,
    "model.attention.nope_dim": 12,
    "model.attention.rope_dim": 16,
    "model.attention.v_dim": 10,
    "model.attention.yarn.scale": 10.0,
    "model.attention.yarn.original_length": 64,
    "model.attention.yarn.mscale": 0.707,
    "model.hyper.streams": 1,
    "model.ffn.dense_dim": 48,
    "model.ffn.dense_layers": 2,
    "model.ffn.routed_experts": 0,
    "model.ffn.shared_experts": 0,
    "model.engram.layers": (),
    "data.seq_len": LENGTH,
}
NAMES = {
    "['attention']['q_proj']": "self_attn.q_proj",
    "['attention']['kv_a_proj']": "self_attn.kv_a_proj_with_mqa",
    "['attention']['kv_b_proj']": "self_attn.kv_b_proj",
    "['attention']['kv_norm']['gain']": "self_attn.kv_a_layernorm",
    "['attention']['o_proj']": "self_attn.o_proj",
    "['ffn']['gate']": "mlp.gate_proj",
    "['ffn']['up']": "mlp.up_proj",
    "['ffn']['down']": "mlp.down_proj",
    "['attention_norm']['gain']": "input_layernorm",
    "['ffn_norm']['gain']": "post_attention_layernorm",
}
OTHERS = {
    "['embedding']": "model.embed_tokens",
    "['norm']['gain']": "model.norm",
    "['head']": "lm_head",
}


def test_logits_and_frequencies(golden):
    data = golden("deepseek_v3_yarn")
    program, state = tiny(**CONFIG)
    attention = program.config.model.attention
    ours = frequencies(attention.rope_dim, attention.rope_theta, attention.yarn)
    np.testing.assert_allclose(ours, data["inv_freq"], rtol=3e-7)  # theirs are float32

    def given(path, leaf):
        name = jax.tree_util.keystr(path)
        for key, theirs in NAMES.items():
            if name.endswith(key):
                each = [data[f"param.model.layers.{i}.{theirs}.weight"] for i in range(2)]
                return np.stack([weight.T for weight in each])
        if name in OTHERS:
            return data[f"param.{OTHERS[name]}.weight"]
        assert "_hyper" in name, name  # one stream as a plain residual: pre = post = res = 1
        return np.tile([40.0, 0, 0], (2, 1)) if name.endswith("['base']") else np.zeros(leaf.shape)

    params = jax.tree_util.tree_map_with_path(given, state.params)
    tokens = data["tokens"]
    batch = {
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)),
    }
    logits, _ = full(program, dataclasses.replace(state, params=params), batch)
    assert np.std(data["logits"]) > 1
    np.testing.assert_allclose(logits, data["logits"], rtol=0, atol=1e-4)
