"""The demo's base model in torch: transformers' DeepSeek-V3, for benchmarks/cpu_step.py.

    pip install torch transformers==5.23.*       # in an environment of its own
    TORCH/bin/python benchmarks/torch_step.py    # reads a line, makes a step, prints its seconds

The sizes of configs/moe_tiny.py with one residual stream: 4 layers, width 128, MLA, 22 routed
experts. Grouped experts, torch's scaled dot-product attention, fused AdamW, clipping, float32.
"""

import sys
import time

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

THREADS = 2


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        intermediate_size=814,
        n_routed_experts=22,
        n_shared_experts=1,
        num_experts_per_tok=3,
        moe_intermediate_size=96,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        attn_implementation="sdpa",
        experts_implementation=sys.argv[1] if len(sys.argv) > 1 else "grouped_mm",
    )
    model = DeepseekV3ForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = [torch.randint(0, 2048, (16, 128)) for _ in range(8)]
    versions = f"torch {torch.__version__}, {sum(p.numel() for p in model.parameters()):,} weights"
    print(versions, flush=True)
    for number, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        tokens = batches[number % len(batches)]
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
