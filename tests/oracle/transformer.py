"""The whole model in NumPy float64, one document: the other oracles joined as the paper says."""

import numpy as np

from tests.oracle import engram, fgrams, hyper_connections, mla, moe, product_keys


def rms(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def layer_of(stack, i):
    """Parameters of layer i of a stack: the leading axis cut off every leaf."""
    return {k: layer_of(v, i) if isinstance(v, dict) else v[i] for k, v in stack.items()}


def hyper(params, streams, function, config):
    """One sub-layer inside its hyper-connection: streams [T, n, d] -> [T, n, d]."""
    n = config.streams
    options = {"iterations": config.sinkhorn_iterations, "eps": config.eps}
    gain = params["norm_gain"] if config.norm_gain else 1.0
    found = [
        hyper_connections.coefficients(
            x,
            params["fn"],
            params["base"],
            params["scale"],
            gain,
            transpose=config.transpose,
            **options,
        )
        for x in streams
    ]
    collapsed = np.stack([pre @ x for (pre, _, _), x in zip(found, streams, strict=True)])
    y = function(collapsed)
    out = [
        res @ x + np.outer(post, out)
        for (_, post, res), x, out in zip(found, streams, y, strict=True)
    ]
    return np.stack(out).reshape(len(streams), n, -1)


def forward(params, biases, tables, tokens, config, addressing, memory=None):
    """tokens [T] of one document -> logits [T, V].

    memory: (layer, streams [T, n, d]) -> what an Engram layer adds to them, in place of the paper's
    form on the rows of the tokens' own hashes."""
    model = config.model
    attention, ffn, eps = model.attention, model.ffn, model.norm_eps
    x = np.repeat(params["embedding"][tokens][:, None], model.hyper.streams, axis=1)
    canonical = tokens if addressing.compression is None else addressing.compression[tokens]
    starts = sorted(int(k) for k in params["blocks"])

    for layer in range(model.layers):
        if layer in model.engram.layers and memory is not None:
            x = x + memory(layer, x)
        elif layer in model.engram.layers and model.engram.form == "scone":
            matrix = params["engrams"][str(layer)]["fgram_proj"]
            x = x + fgrams.added(tokens, x, addressing.layers[layer], tables[str(layer)], matrix)
        elif layer in model.engram.layers:
            own = addressing.layers[layer]
            rows = tables[str(layer)][engram.hash_rows(canonical, own, addressing.pad_id)]
            x = x + engram.engram(
                rows.reshape(len(tokens), -1),
                x,
                params["engrams"][str(layer)],
                dilation=model.engram.max_ngram,
                gate_eps=np.finfo(np.float64).eps,
                conv_eps=1e-5,
            )
        if layer in model.product_keys.layers:
            own, keys = params["product_keys"][str(layer)], model.product_keys
            own = own | {"query_norm": own["query_norm"]["gain"]}
            how = {"heads": keys.heads, "top_k": keys.top_k, "eps": eps}
            y, _ = product_keys.forward_backward(x, own, np.zeros(x[:, 0].shape), **how)
            x = x + y[:, None]
        first = max(s for s in starts if s <= layer)
        block = layer_of(params["blocks"][str(first)]["blocks"], layer - first)
        weights = block["attention"] | {"kv_norm": block["attention"]["kv_norm"]["gain"]}

        def attend(h, block=block, weights=weights):
            h = rms(h, block["attention_norm"]["gain"], eps)
            return mla.attention(
                h,
                np.arange(len(h)),
                np.ones(len(h)),
                weights,
                heads=attention.heads,
                nope=attention.nope_dim,
                rope=attention.rope_dim,
                value=attention.v_dim,
                theta=attention.rope_theta,
                eps=eps,
            )

        def feed(h, layer=layer, first=first, block=block):
            h = rms(h, block["ffn_norm"]["gain"], eps)
            own = block["ffn"]
            if "router" not in own:
                return np.stack([moe.swiglu(t, own["gate"], own["up"], own["down"]) for t in h])
            bias = layer_of(biases["blocks"][str(first)]["blocks"], layer - first)
            y, _ = moe.moe(
                h,
                own["router"],
                bias["ffn"]["router_bias"],
                (own["gate"], own["up"], own["down"]),
                top_k=ffn.top_k,
                normalise=ffn.normalise_top_k,
                scaling=ffn.routed_scaling,
                shared=tuple(own["shared"][k] for k in ("gate", "up", "down")),
            )
            return y

        x = hyper(block["attention_hyper"], x, attend, model.hyper)
        x = hyper(block["ffn_hyper"], x, feed, model.hyper)
    return rms(x.sum(1), params["norm"]["gain"], eps) @ params["embedding"].T
